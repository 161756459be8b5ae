"""The figures of a comparison, each with its caption; the report and `make paper` show the same."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from secateur.reporting import ablation
from secateur.reporting.agreement import agreement, agreement_matrices
from secateur.reporting.comparison import Cell
from secateur.reporting.cost_figures import accuracy_against, one_by_one
from secateur.reporting.costs import first_token_flops, prefill_times
from secateur.reporting.figures import UNPRUNED, looks, short_names
from secateur.reporting.score_figure import scores

_INTERVALS = "The intervals are in the figures of scores and of single methods."


class Chart(NamedTuple):
    """A figure, the name of its file without suffix, and its caption."""

    name: str
    figure: Figure
    caption: str


def charts(
    cells: Sequence[Cell],
    compared: pd.DataFrame,
    results: Path,
    title: str,
    warnings: list[str],
    highlight: Sequence[str] = (),
) -> Iterator[Chart]:
    """Draw all figures of the cells of one setting, one at a time.

    Args:
        compared: of `secateur.reporting.comparison.compare`.
        results: folder of the sweep, which may hold benchmarks.
        title: of the setting.
        warnings: receives the reason for each figure that cannot be drawn.
        highlight: as in `secateur.reporting.figures.looks`.

    Raises:
        ValueError: as `looks`.
    """
    named = _named(compared, highlight)
    yield Chart(
        "scores",
        scores(compared, f"Scores with 95 % intervals, {title}", highlight),
        "Scores by budget, method and task, with 95 % intervals; the methods of a budget from best "
        f"to worst in the first column.{named}",
    )
    if (compared["method"] != UNPRUNED).any():
        tokens = compared.set_index(["task", "method", "budget"])["tokens"]
        axis = "visual tokens, mean over layers"
        yield Chart(
            "accuracy_tokens",
            accuracy_against(
                compared, tokens, axis, f"Score against tokens, {title}", highlight, front=False
            ),
            f"Scores against visual tokens, fewer to the right. {_INTERVALS}{named}",
        )
        yield Chart(
            "accuracy_tokens_single",
            one_by_one(compared, tokens, axis, f"Each method by itself, {title}", highlight),
            "Each method by itself with 95 % intervals, from best to worst at the smallest budget.",
        )
        yield from _against_costs(cells, compared, results, title, warnings, highlight)
    for one in ablation.varied(cell.record.identity for cell in cells):
        yield Chart(
            f"{one.method}_{one.others}_{one.field}",
            ablation.figure(one, compared, title),
            f"Scores against {one.field} of {one.method}. {ablation.CAPTION}",
        )
    if shares := agreement(cells):
        yield Chart(
            "agreement",
            agreement_matrices(shares, f"Agreement between methods, {title}"),
            "Documents that two methods answer alike, mean over the tasks. Right or wrong does not "
            "matter here.",
        )


def _against_costs(
    cells: Sequence[Cell],
    compared: pd.DataFrame,
    results: Path,
    title: str,
    warnings: list[str],
    highlight: Sequence[str],
) -> Iterator[Chart]:
    named = _named(compared, highlight)
    try:
        costs = first_token_flops(cells)
    except ValueError as error:
        warnings.append(f"No accuracy against FLOPs: {error}")
    else:
        text = (
            "Scores against FLOPs until the first token (tower, projector, pruner, prefill, head), "
            f"mean over documents, cheaper to the right. {_INTERVALS}{named}"
        )
        if costs.uncounted:
            text += f" Without the cost of the pruner itself: {', '.join(costs.uncounted)}."
        unit, power = (1e9, "10⁹") if costs.mean.max() < 1e11 else (1e12, "10¹²")
        axis = f"FLOPs until the first token, {power}"
        figure = accuracy_against(
            compared, costs.mean / unit, axis, f"Score against FLOPs, {title}", highlight
        )
        yield Chart("accuracy_flops", figure, text)
    for number, (axis, times) in enumerate(prefill_times(cells, results).items()):
        text = (
            "Scores against measured prefill, faster to the right: the bench's median, on its own "
            f"prompts, apart from the answers. {_INTERVALS}{named}"
        )
        if not set(times.index.get_level_values("method")) - {UNPRUNED}:
            warnings.append(f"No scores against {axis}: the bench timed none of these methods.")
            continue
        timed = compared.set_index(["task", "method", "budget"]).index.isin(times.index)
        absent = compared[~timed][["method", "budget"]].drop_duplicates().to_numpy()
        if len(absent):
            rows = ", ".join(sorted(f"{method} at {budget}" for method, budget in absent))
            text += f" Not timed: {rows}."
        figure = accuracy_against(
            compared, times, axis, f"Score against measured prefill, {title}", highlight
        )
        yield Chart(f"accuracy_prefill_{number}", figure, text)


def _named(compared: pd.DataFrame, highlight: Sequence[str]) -> str:
    """How many methods have no colour, and the fields that labels leave out; may be empty."""
    look = looks(compared, highlight)
    grey = sum(not own.named for own in look.values())
    short = short_names([*look])
    longer = [label for label in look if short[label] != label]
    text = f" {grey} methods have no colour of their own." if grey else ""
    if longer:
        text += f" Labels without fields: {', '.join(longer)}."
    return text
