"""``python -m tests.golden --write [--force]``."""

import argparse
import sys

from tests.golden import write

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="write golden vectors")
    parser.add_argument("--write", action="store_true", required=True)
    parser.add_argument("--force", action="store_true", help="replace files that differ")
    sys.exit(1 if write(parser.parse_args().force) else 0)
