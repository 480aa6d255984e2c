"""``python -m tests.fuzz --write | --run SECONDS | --keep FILE``."""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="inputs for decoders")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", action="store_true", help="bring the corpus up to date")
    what.add_argument("--run", type=int, metavar="SECONDS", help="search (needs atheris)")
    what.add_argument("--keep", type=Path, metavar="FILE", help="add a finding to the corpus")
    parser.add_argument("--out", type=Path, default=Path(), help="directory of findings")
    options = parser.parse_args()
    if options.run is not None:
        from tests.fuzz.search import search

        sys.exit(search(options.run, options.out))
    from tests import fuzz

    if options.write:
        fuzz.write()
    else:
        print(f"kept as {fuzz.keep(options.keep)}")
