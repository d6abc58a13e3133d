"""The ordinary, smaller model and its directory."""
