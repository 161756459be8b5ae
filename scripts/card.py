"""Fill the measured sections of the embedded model's card from a sweep.

make sweep pruner=none,random,uniform,fastervlm,visionzip,promprune,divprune,scope,prunesid,\
sppruner,zspaprune seeds=0,1,2
python scripts/sweep.py pruner=none 'tasks=[vqav2,mmbench_en]' && python scripts/card.py
"""

import argparse
import re
from collections import Counter, defaultdict
from pathlib import Path

import pandas as pd

from secateur.paths import ROOT, SHAPES_MODEL
from secateur.records import Record
from secateur.reporting.tables import RELATIVE, SD, accuracy
from secateur.shapes.datasets import SWEEP_TASKS
from secateur.shapes.questions import kind_of
from secateur.store import Store

CARD = SHAPES_MODEL / "README.md"


def with_kinds(rows: pd.DataFrame) -> pd.DataFrame:
    """Add the kind of each document's question, and whether a letter answers it."""
    target = rows["target"].str.split(";").str[0]  # VQAv2 lists other people's answers after it
    letter = target.map(lambda answer: len(answer) == 1 and answer.isalpha())
    return rows.assign(target=target, kind=rows["prompt"].map(kind_of), letter=letter)


def chance(rows: pd.DataFrame) -> float:
    """Accuracy of the best constant answer to each kind of question.

    Questions that are answered by a letter count as kinds of their own.
    """
    answers: dict[tuple[str, bool], Counter[str]] = defaultdict(Counter)
    for kind, letter, target in zip(rows["kind"], rows["letter"], rows["target"], strict=True):
        answers[kind, letter][target.lower()] += 1
    return sum(counts.most_common(1)[0][1] for counts in answers.values()) / len(rows)


def shares(rows: pd.DataFrame, by: str) -> str:
    """Documents, share of right answers and chance, by task or kind."""
    table = pd.DataFrame(
        {
            name: {"documents": len(own), "right": own["score"].mean(), "chance": chance(own)}
            for name, own in rows.groupby(by)
        }
    ).T
    return table.to_markdown(floatfmt=("", ".0f", ".3f", ".3f"))


def methods(records: list[Record]) -> str:
    """Relative scores over the tasks of `make sweep`: a row per method, a column per budget."""
    table = accuracy([one for one in records if one.identity.task in SWEEP_TASKS])
    text = table[RELATIVE].map("{:.1f}".format)
    if RELATIVE + SD in table:
        spread = table[RELATIVE + SD].map(lambda value: f" ± {value:.1f}" if value == value else "")
        text += spread
    pruned = table.assign(text=text)[table["method"] != "none"]
    wide = pruned.pivot(index="method", columns="budget", values="text")
    budgets = sorted(map(str, wide), key=int, reverse=True)
    smallest = pruned[pruned["budget"] == budgets[-1]].set_index("method")[RELATIVE]
    order = smallest.sort_values(ascending=False).index
    return wide.loc[order, budgets].fillna("-").to_markdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--limit", type=int, default=240, help="of the sweep (default 240)")
    options = parser.parse_args()
    store = Store(options.results)
    records = [
        record
        for record in store.records()
        if (record.identity.suite.name, record.identity.limit) == ("shapes", options.limit)
    ]
    unpruned = [record for record in records if record.identity.pruner.name == "none"]
    if not unpruned or len(unpruned) == len(records):
        parser.error(f"{options.results} lacks cells of `none` or of methods; run the sweep first")
    rows = pd.concat(
        [
            with_kinds(store.cell(one.identity).samples()).assign(task=one.identity.task)
            for one in unpruned
        ]
    )
    blocks = {
        "tasks": shares(rows, "task"),
        "kinds": shares(rows, "kind"),
        "methods": methods(records),
    }
    card = CARD.read_text()
    for name, text in blocks.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        card = block.sub(rf"\g<1>{text}\n\g<2>", card)
        print(text, end="\n\n")
    CARD.write_text(card)


if __name__ == "__main__":
    main()
