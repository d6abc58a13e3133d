"""What a model is made of and how it is cut: architectures (the table), blocks, shrink, export."""
