"""What ranks of a process group must do alike, and tensors that are sharded."""
