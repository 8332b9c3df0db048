"""`python -m wanloom` is the command `wanloom`."""

import sys

from wanloom.cli import main

if __name__ == "__main__":
    sys.exit(main())
