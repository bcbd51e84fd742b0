"""`python -m rfkernels` is the `rfkernels` command."""

import sys

from rfkernels.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
