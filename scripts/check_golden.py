"""Check the pruners against recorded outputs of the official code.

    python scripts/check_golden.py PATH

PATH is a folder, or one JSON file with its safetensors file beside it. Every case runs through the
public classes. One line per method tells how many cases are exact and the worst difference of a
feature. A case that is not exact runs again in float64: if candidates less than 1e-6 apart decide
it, it is a tie. Ties and mismatches are listed; any mismatch gives a non-zero exit status.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from reference.golden import GoldenError, check, files


def main() -> int:
    """Check, print, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path)
    try:
        reports = []
        for path in files(parser.parse_args().path):
            reports.append(check(path))
            print(reports[-1], flush=True)
    except GoldenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    mismatches = [line for report in reports for line in report.mismatches]
    ties = [line for report in reports for line in report.ties]
    cases, exact = (sum(getattr(report, name) for report in reports) for name in ("cases", "exact"))
    print(f"{exact} of {cases} cases exact, {len(ties)} ties")
    for line in ties:
        print(f"  tie: {line}")
    for line in mismatches:
        print(f"  mismatch: {line}")
    return 1 if mismatches else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
