"""Judge the quantitative claims of the papers' abstracts.

python scripts/claims.py [--results results]     the same as `make claims`

It prints a page and writes it to results/claims.md: for each claim what the paper's own tables say,
the cells that judge it and their command, the reproduced value with its interval, and a verdict.
"""

import argparse
from pathlib import Path

from secateur.paths import ROOT
from secateur.progress import count, print_error, run_script
from secateur.reporting import claims, claims_page, comparison
from secateur.reporting.stats import RESAMPLES
from secateur.reporting.versions import Stale, left_out


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "results",
        help="folder of a sweep (default: results)",
    )
    parser.add_argument(
        "--resamples",
        type=count,
        default=RESAMPLES,
        help=f"how often images are resampled (default: {RESAMPLES})",
    )
    options = parser.parse_args()
    if not options.results.is_dir():
        parser.error(f"--results {options.results}: no such folder")
    damaged: list[str] = []
    stale: list[Stale] = []
    cells = comparison.load(options.results, damaged, stale)
    for message in [*(f"REFUSED {text}" for text in damaged), *left_out(stale)]:
        print_error(message)
    bench = claims_page.samples(options.results)
    evidence = claims.Evidence(cells, bench, options.resamples)
    page = claims_page.page(claims_page.judge(claims_page.load(), evidence))
    (options.results / "claims.md").write_text(page, encoding="utf-8")
    print(page)
    return int(bool(damaged))


if __name__ == "__main__":
    run_script(main)
