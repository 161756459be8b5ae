"""What the cells of a sweep cost, by task, method and budget."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from secateur.reporting.comparison import TOKENS, Cell


class Costs(NamedTuple):
    """`mean` by (task, method, budget), with the mean over the tasks as task "average"; methods whose own cost is not in it."""

    mean: pd.Series
    uncounted: list[str]


def first_token_flops(cells: Sequence[Cell]) -> Costs:
    """FLOPs until the first token is there (tower, projector, pruner, prefill, head), by the records, mean over documents.

    Raises:
        ValueError: a record of before records had them.
    """
    without = [cell for cell in cells if "flops" not in cell.record]
    if without:
        raise ValueError(
            f"the records of {len(without)} cells, such as {without[0].key}, have no FLOPs; run them again"
        )
    means = {
        (cell.task, cell.method, cell.budget): cell.record["flops"]["first_token"] for cell in cells
    }
    uncounted = {cell.method for cell in cells if cell.record["flops"]["pruner"] is None}
    return Costs(_with_average(means, len({cell.task for cell in cells})), sorted(uncounted))


def prefill_times(cells: Sequence[Cell], results: Path) -> dict[str, pd.Series]:
    """Milliseconds of prefill, median of the bench's samples, by (task, method, budget).

    An entry for each machine, type and attention kernel on which the bench ran the cells' model at true geometry (the files
    results/bench/bench-*.parquet). Its prompts are its own, the same for all tasks. A cell is left out where the bench has no
    setting of its method and tokens an image, and the average of a method where a task is.
    """
    found: dict[str, pd.Series] = {}
    model = cells[0].record["identity"]["model"]["name"]
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
                for (method, tokens), time in medians.items():
                    same = method == ("unpruned" if cell.name == "none" else cell.method)
                    if same and abs(tokens - own_tokens) <= TOKENS * own_tokens:
                        times[cell.task, cell.method, cell.budget] = time
            if times:
                found[f"prefill, ms ({', '.join(map(str, where))})"] = _with_average(
                    times, len({cell.task for cell in cells})
                )
    return found


def _with_average(values: dict[tuple[str, str, str], float], tasks: int) -> pd.Series:
    """Values by (task, method, budget), and their mean as task "average" where there is one for every task."""
    mean = pd.Series(values).rename_axis(["task", "method", "budget"])
    by_method = mean.groupby(["method", "budget"])
    average = by_method.mean()[by_method.size() == tasks]
    return pd.concat([mean, pd.concat({"average": average}, names=["task"])])
