"""``python -m tests.golden --write [--force] | --check``."""

import argparse
import sys

from tests.golden import check, write

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="golden vectors")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="write missing files")
    what.add_argument("--check", action="store_true", help="compare with all files")
    parser.add_argument("--force", action="store_true", help="replace files that differ")
    options = parser.parse_args()
    failed = check() if options.check else write(options.force)
    sys.exit(1 if failed else 0)
