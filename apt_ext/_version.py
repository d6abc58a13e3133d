__version__ = "0.1.0"  # the one place: pyproject.toml, build_info() and apt_ext.__version__ read it from here
