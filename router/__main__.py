"""``python -m router`` is ``braid router``."""

import sys

from braid.cli import main

if __name__ == "__main__":
    sys.exit(main(["router", *sys.argv[1:]]))
