"""What a training step takes on GPUs that need not be here, from a model's shapes and a table of rates."""
