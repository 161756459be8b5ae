"""Print how many of the papers' numbers have a cell that one command recomputes.

    python scripts/coverage.py     the same as `make coverage`

Writes results/coverage.md: the count and the reasons of the other numbers, by paper and table.
"""

import argparse

from secateur.paths import ROOT
from secateur.reporting import coverage

PAGE = ROOT / "results" / "coverage.md"


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    numbers = coverage.of_papers(ROOT / "results")
    PAGE.write_text(coverage.page(numbers))
    print(PAGE.read_text())
    print(coverage.summary(numbers))


if __name__ == "__main__":
    main()
