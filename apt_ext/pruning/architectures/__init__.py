"""The table of architectures, and look-ups in it."""
