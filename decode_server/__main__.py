"""``python -m decode_server`` is ``braid decode``."""

import sys

from braid.cli import main

if __name__ == "__main__":
    sys.exit(main(["decode", *sys.argv[1:]]))
