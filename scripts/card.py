"""Fill the accuracy section of the embedded model's card from a sweep over all documents.

make sweep pruner=none,random,fastervlm,scope budget=16 limit=null && python scripts/card.py
"""

import argparse
import re
from collections import Counter, defaultdict
from pathlib import Path

import pandas as pd

from secateur.paths import ROOT, SHAPES_MODEL
from secateur.shapes.datasets import TRAINED_TASKS
from secateur.store import Store

CARD = SHAPES_MODEL / "README.md"


def chance(rows: pd.DataFrame) -> float:
    """Accuracy of the best constant answer to each wording of a question.

    A wording is the first three words; questions answered by a letter count as one wording.
    """
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for prompt, target in zip(rows["prompt"], rows["target"], strict=True):
        letters = len(target) == 1 and target.isalpha()
        answers["letter" if letters else " ".join(prompt.split()[2:5])][target.lower()] += 1
    return sum(counts.most_common(1)[0][1] for counts in answers.values()) / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    store = Store(parser.parse_args().results)

    scores: dict[str, dict[str, float]] = defaultdict(dict)
    floor: dict[str, float] = {}
    for record in store.records():
        identity = record.identity
        if (identity.suite.name, identity.limit, identity.budget) in {
            ("shapes", None, "full"),
            ("shapes", None, "16"),
        }:
            rows = store.cell(identity).samples()
            scores[f"{identity.pruner.label} {identity.budget}"][identity.task] = rows[
                "score"
            ].mean()
            floor[identity.task] = chance(rows)
    table = pd.DataFrame(scores).T[list(TRAINED_TASKS)]
    table.loc["chance"] = pd.Series(floor)
    table["mean"] = table.mean(axis=1)
    corrected = ((table - table.loc["chance"]) / (1 - table.loc["chance"]))[
        list(TRAINED_TASKS)
    ].mean(axis=1)
    table["mean, chance-corrected"] = corrected
    table = table.sort_values("mean", ascending=False)
    text = table.to_markdown(floatfmt=".3f")
    block = re.compile(r"(<!-- accuracy -->\n).*?(<!-- /accuracy -->)", re.DOTALL)
    CARD.write_text(block.sub(lambda match: match[1] + text + "\n" + match[2], CARD.read_text()))
    print(text)


if __name__ == "__main__":
    main()
