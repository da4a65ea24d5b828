"""``python -m tokenenv``, and what ``torchrun -m tokenenv`` starts: the command line."""

import sys

from tokenenv.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
