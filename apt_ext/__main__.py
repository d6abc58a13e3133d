"""`python -m apt_ext` is the command `apt-ext`."""

import sys

from .tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
