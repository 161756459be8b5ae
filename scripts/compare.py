"""Compare two methods: every published pair of numbers, and the cells of a results folder.

python scripts/compare.py --a scope --b divprune --model llava_1_5_7b --budget 64
make compare A=scope B=divprune MODEL=llava_1_5_7b BUDGET=64     the same
make compare BUDGET=64                                           all methods in one matrix

Without --budget it is the one with the most numbers. Published differences are in percent of the
unpruned score of the number's own table; differences of cells have an interval.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from secateur.paths import ROOT
from secateur.progress import count, run_script
from secateur.pruners import REGISTRY
from secateur.reporting import compare, compare_cells, comparison
from secateur.reporting.comparison import FEW_IMAGES, Cell
from secateur.reporting.render import heading
from secateur.reporting.reported import AVERAGE, load_reported
from secateur.reporting.stats import RESAMPLES
from secateur.reporting.variants import method_of

WIDTH = 120  # of what is not a terminal
CELL = (
    "58.3 of 61.9 (94.2 %): the score, its table's unpruned score, and the first in percent of the "
    "second, in which the difference is. A difference marked score has no unpruned score."
)
ORIGINS = (
    "own: the paper's own method. run: no other paper prints these numbers. copied from, as in: at "
    "least half of the scores are equal there, so the row is copied or the same run."
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--a", default="", help="a method, e.g. scope")
    parser.add_argument("--b", default="", help="another one")
    parser.add_argument("--model", default="llava_1_5_7b", help="default: llava_1_5_7b")
    parser.add_argument("--budget", default="", help='"64", "11.1%%"; default: most numbers')
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "results",
        help="folder of a sweep (default: results)",
    )
    parser.add_argument("--resamples", type=count, default=RESAMPLES, help="of the images")
    options = parser.parse_args()
    if not options.results.is_dir():
        parser.error(f"--results {options.results}: no such folder")
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, markup=False)
    reported, damaged = load_reported(), list[str]()
    cells = comparison.load(options.results, damaged)
    for message in damaged:
        console.print(f"REFUSED {message}", style="red")
    names = [name for name in (options.a, options.b) if name]
    try:
        if len(names) == 1:
            raise ValueError("give two methods, A and B, or none for the matrix of all")
        names = [compare.known(name, compare.methods(reported), "method") for name in names]
        if len(set(names)) == 1:
            raise ValueError(f"A and B are both {names[0]}; give two methods")
        model = compare.known(options.model, compare.models(reported, cells), "model")
        budget = options.budget or compare.usual_budget(reported, cells, model, names)
        budgets = compare.spellings(reported, cells, model, budget)
    except ValueError as error:
        parser.error(str(error))
    scores = compare.scores_at(reported, model, budgets)
    where = f"{model} at budget {budget}"
    if names:
        console.print(f"{names[0]} against {names[1]}, {where}\n", style="bold")
        for name in names:
            if not (scores["method"] == name).any():
                exist = compare.where(reported, name)
                console.print(f"No number of {name} is published for these. Published: {exist}.")
        show_pairs(console, scores, *names)
        show_measured(console, cells, names, model, budget, budgets, options.resamples)
    else:
        show_matrices(console, scores, cells, model, where, budgets, options.resamples)
    return int(bool(damaged))


def show_pairs(console: Console, scores: pd.DataFrame, a: str, b: str) -> None:
    """Print every published pair of two methods, a summary, and what was left out."""
    pairs = compare.pairs(scores, a, b)
    if not pairs.empty:
        if not pairs["one_table"].any():
            console.print(
                "No table prints both methods. The differences are of two papers, each with its "
                "own unpruned row."
            )
        console.print("Published pairs, each pair of runs once:", style="bold")
        table = _table([a, b, "difference"])
        tables = ["paper_a", "table_a", "paper_b", "table_b"]
        for _, own in pairs.groupby(tables, sort=False):
            table.add_section()
            first = own.iloc[0]
            also = ", ".join(dict.fromkeys(text for text in own["also"] if text))
            sides = [
                f"{first[f'paper_{side}']} {first[f'table_{side}']}\n({first[f'origin_{side}']})"
                for side in "ab"
            ]
            table.add_row("", *sides, "", style="bold")
            for pair in own.to_dict("records"):
                table.add_row(
                    heading(str(pair["task"]), str(pair["metric"])),
                    *(_score({key: pair[f"{key}_{side}"] for key in _SCORE}) for side in "ab"),
                    _signed(pair["difference"])
                    if pair["difference"] == pair["difference"]
                    else f"score {pair['value_a'] - pair['value_b']:+.1f}",
                )
            if also:
                table.add_row("", f"also in {also}", "", "")
        console.print(table)
        console.print(f"{CELL} {ORIGINS}\n")
    _show_summary(console, compare.summary(pairs), a, b)
    left_out = _left_out(scores, pairs, a, b)
    if left_out:
        console.print(left_out)
    console.print()


_SCORE = ("value", "unpruned", "relative", "suspect")


def _score(side: dict[str, float]) -> str:
    """A score beside the unpruned score of its table."""
    text = f"{side['value']:g}" + "?" * bool(side["suspect"])
    if pd.isna(side["unpruned"]):
        return f"{text}, no unpruned score"
    return f"{text} of {side['unpruned']:g} ({side['relative']:.1f} %)"


def _signed(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:+.1f}"


def _table(columns: Sequence[str]) -> Table:
    table = Table()
    table.add_column("task")
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _show_summary(console: Console, found: pd.DataFrame, a: str, b: str) -> None:
    """Print the summary by task, within tables and across them."""
    for one_table, own in found.groupby("one_table", sort=False):
        kind = "in one table" if one_table else "across tables"
        console.print(f"{a} minus {b} {kind}, percent of the unpruned score:", style="bold")
        table = _table(["pairs", f"{a} higher", "mean", "lowest", "highest"])
        for row in own.to_dict("records"):
            average = row["task"] == AVERAGE
            table.add_row(
                "mean over tasks" if average else heading(str(row["task"]), str(row["metric"])),
                f"{row['pairs']}",
                f"{row['a_higher']}",
                _signed(row["mean"]),
                *(_signed(row[name]) if row["pairs"] > 1 else "" for name in ("lowest", "highest")),
                style="bold" if average else None,
            )
        console.print(table)


def _left_out(scores: pd.DataFrame, pairs: pd.DataFrame, a: str, b: str) -> str:
    """What both methods have numbers of and no pair shows, and what the summary leaves out."""
    one, other = (scores[scores["method"] == name] for name in (a, b))
    notes = [
        f"{row['task']} of {row['pairs']} pair{'s' * (row['pairs'] != 1)} of runs, printed in "
        f"{row['metrics']}"
        for row in compare.other_metrics(scores, a, b).to_dict("records")
    ]
    bare = pd.concat([one, other])
    bare = bare[bare["unpruned"].isna()]
    without = set(bare["paper"] + " " + bare["table"])
    shown = pairs[pairs["one_table"]]
    without -= set(shown["paper_a"] + " " + shown["table_a"])
    if without:
        notes.append(f"tables without an unpruned score: {', '.join(sorted(without))}")
    if (pairs["suspect_a"] | pairs["suspect_b"]).any():
        notes.append("numbers marked ? are suspect in the source and not in the summary")
    return f"Left out: {'; '.join(notes)}." if notes else ""


def show_measured(
    console: Console,
    cells: Sequence[Cell],
    names: Sequence[str],
    model: str,
    budget: str,
    budgets: set[str],
    resamples: int,
) -> None:
    """Print the paired differences of our cells, or the command that makes them."""
    a, b = names
    found = compare_cells.measured(cells, a, b, model, budgets, resamples)
    for setting, own in found.groupby("setting", sort=False):
        console.print(f"Our cells, {setting}:", style="bold")
        table = _table([a, b, "difference", "95 % interval", "p"])
        for row in own.to_dict("records"):
            average = row["task"] == AVERAGE
            name = "average, %" if average else heading(str(row["task"]), str(row["metric"]))
            interval = "–" if pd.isna(row["low"]) else f"{row['low']:+.1f} to {row['high']:+.1f}"
            p = "–" if pd.isna(row["p"]) else f"{row['p']:.2g}"
            scores = ["–" if pd.isna(row[side]) else f"{row[side]:.1f}" for side in "ab"]
            table.add_row(name, *scores, _signed(row["difference"]), interval, p)
        console.print(table)
        for row in own[own["note"] != ""].to_dict("records"):
            console.print(f"{row['task']}: {row['note']}.")
    if found.empty:
        unknown = [name for name in names if method_of(name) not in REGISTRY]
        console.print(f"No task has a cell of {a} and of {b} here.")
        if unknown:
            console.print(f"No method of this project: {', '.join(unknown)}.")
        else:
            suite = "" if model.startswith("shapes") else " suite=hub"
            methods = ",".join(dict.fromkeys(["none", *map(method_of, names)]))
            console.print(
                f"To run them: python scripts/sweep.py -m{suite} model={model} pruner={methods} "
                f"budget={budget}"
            )


def show_matrices(
    console: Console,
    scores: pd.DataFrame,
    cells: Sequence[Cell],
    model: str,
    where: str,
    budgets: set[str],
    resamples: int,
) -> None:
    """Print the differences of all pairs of methods, published and ours."""
    published = compare.matrix(scores)
    console.print(f"All methods, {where}: row minus column, percent of the unpruned score\n")
    if published.empty:
        console.print("No published table has two methods of this model and budget.")
    else:
        console.print("Published in one table, mean over tasks, then over runs:", style="bold")
        _show_matrix(console, published["difference"].map(_signed), published["difference"])
        console.print(
            "Empty: no table prints both. Rows by the mean of their differences; they meet other "
            "rivals, so this is no ranking. Copied rows count once; ablations, suspect numbers and "
            "tables without an unpruned row are left out.\n"
        )
    for group in comparison.settings(
        [cell for cell in cells if cell.record.identity.model.name == model]
    ):
        title = group[0].record.identity.title
        try:
            own = compare_cells.measured_matrix(group, budgets, resamples)
        except ValueError as error:
            console.print(f"No matrix of our cells, {title}: {error}.")
            continue
        if own.empty:
            continue
        clear = (own["low"] > 0) | (own["high"] < 0)
        number = own["tasks"].iloc[0]
        over = f"mean over {number} tasks" if number > 1 else "one task"
        console.print(f"Our cells, {title}, {over}:", style="bold")
        text = own["difference"].map(_signed) + clear.map({True: "*", False: ""})
        _show_matrix(console, text, own["difference"])
        short = f" Fewer than {FEW_IMAGES} images: it is too short." * bool(own["few_images"].any())
        console.print(f"*: the 95 % interval of the paired difference does not hold 0.{short}\n")


def _show_matrix(console: Console, text: pd.Series, values: pd.Series) -> None:
    """Print pairs as a matrix, the rows with the largest means first, in blocks that fit."""
    order = values.groupby(level=0).mean().sort_values(ascending=False).index
    numbered = {name: str(number) for number, name in enumerate(order, 1)}
    wide = text.unstack().reindex(index=order, columns=order).fillna("").rename(columns=numbered)
    wide.index = pd.Index([f"{numbered[name]} {name}" for name in order])
    wide.columns.name = None
    console.print(wide.to_string(line_width=console.width))


if __name__ == "__main__":
    run_script(main)
