"""Print the invariants of injection for every family, measured on tiny random models.

python scripts/invariants.py                     all families
python scripts/invariants.py internvl qwen2_vl   some of them, by model type

Each number is the largest difference over the attention kernels sdpa and eager: of float32 logits,
of attention weights (saliency) or of FLOPs. "-": the family, its kernels or the installed release
of transformers have nothing to compare. Exit status 1 if a number is above what is allowed.
"""

import argparse
import sys

import torch
import transformers

from secateur.families import MODULES
from secateur.invariants import measure, table


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=", ".join(MODULES))
    chosen = parser.parse_args().families or list(MODULES)
    if unknown := sorted(set(chosen) - set(MODULES)):
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(MODULES)}")
    text, broken = table(
        {family: [measure(family, kernel) for kernel in ("sdpa", "eager")] for family in chosen}
    )
    print(f"transformers {transformers.__version__}, torch {torch.__version__}\n\n{text}")
    for line in broken:
        print(f"BROKEN {line}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
