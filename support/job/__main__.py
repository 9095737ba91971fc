"""`python -m support.job`, alone or under torchrun."""

import sys

from support.job.command import main

if __name__ == "__main__":
    sys.exit(main())
