"""``python -m prefill_server`` is ``braid prefill``."""

import sys

from braid.cli import main

if __name__ == "__main__":
    sys.exit(main(["prefill", *sys.argv[1:]]))
