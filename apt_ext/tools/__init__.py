"""How people use the package from a terminal: the command line, and the demo with its data, training runs and report."""
