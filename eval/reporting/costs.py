"""What the cells of a sweep cost, by task, method and budget."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple, cast

import pandas as pd

from secateur.reporting.comparison import TOKENS, Cell
from secateur.reporting.seeds import row_names


class Costs(NamedTuple):
    """Costs of cells.

    Attributes:
        mean: by (task, method, budget); the mean over the tasks is task "average".
        uncounted: methods whose own cost is not part of it.
    """

    mean: pd.Series
    uncounted: list[str]


def first_token_flops(cells: Sequence[Cell]) -> Costs:
    """FLOPs until the first token (tower, projector, pruner, prefill, head), mean over documents.

    Raises:
        ValueError: an old record, which has no FLOPs.
    """
    without = [cell for cell in cells if cell.record.flops is None]
    if without:
        raise ValueError(
            f"the records of {len(without)} cells, such as {without[0].key}, have no FLOPs; "
            "run them again"
        )
    names = row_names(cell.record.identity for cell in cells)
    by_row, uncounted = defaultdict(list), set()
    for cell in cells:
        flops, method = cell.record.flops or {}, names[cell.method]
        by_row[cell.task, method, cell.budget].append(flops["first_token"] or math.nan)
        if flops["pruner"] is None:
            uncounted.add(method)
    means = {key: fmean(values) for key, values in by_row.items()}
    return Costs(_with_average(means, len({cell.task for cell in cells})), sorted(uncounted))


def prefill_times(cells: Sequence[Cell], results: Path) -> dict[str, pd.Series]:
    """Milliseconds of prefill, median of the bench's samples, by (task, method, budget).

    There is an entry for each machine, type and attention kernel on which the bench ran the cells'
    model at true geometry (the files results/bench/bench-*.parquet). The bench's prompts are its
    own, the same for all tasks. A cell is left out if the bench did not time its method at its
    tokens per image; a method's average is left out if one of its tasks is.
    """
    found: dict[str, pd.Series] = {}
    names = row_names(cell.record.identity for cell in cells)
    model = cells[0].record.identity.model.name
    for path in sorted((results / "bench").glob("bench-*.parquet")):
        samples = pd.read_parquet(path)
        samples = samples[
            (samples["model"] == model)
            & (samples["geometry"] == "true")
            & (samples["kind"] != "ceiling")
        ]
        for where, own in samples.groupby(["device", "dtype", "attn_implementation"]):
            medians = own.groupby(["method", "budget"])["prefill"].median()
            times = {}
            for cell in cells:
                own_tokens = cell.per_image(cell.tokens)
                for key, time in medians.items():
                    method, tokens = cast(tuple[str, float], key)
                    own_names = (cell.method, names[cell.method])  # the time needs no seed
                    same = method in (("unpruned",) if cell.name == "none" else own_names)
                    if same and abs(tokens - own_tokens) <= TOKENS * own_tokens:
                        times[cell.task, names[cell.method], cell.budget] = time
            if times:
                found[f"prefill, ms ({', '.join(map(str, where))})"] = _with_average(
                    times, len({cell.task for cell in cells})
                )
    return found


def _with_average(values: dict[tuple[str, str, str], float], tasks: int) -> pd.Series:
    """Values by (task, method, budget), with their mean as task "average".

    Methods without a value for every task have no average.
    """
    mean = pd.Series(values).rename_axis(["task", "method", "budget"])
    by_method = mean.groupby(["method", "budget"])
    average = by_method.mean()[by_method.size() == tasks]
    return pd.concat([mean, pd.concat({"average": average}, names=["task"])])
