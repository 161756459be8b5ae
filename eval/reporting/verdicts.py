"""Does a reproduced number agree with the printed one, and may the two be compared at all.

Absolute scores depend on checkpoint and preprocessing, so a method is judged by its score in percent of its own unpruned model,
against the same ratio of the printed numbers. The documents are those of the paper, so its numbers are no second sample.

match            differs by at most `MATCH` points, or lies such that our 95 % interval contains the printed ratio
close            differs by at most `CLOSE` points
miss             differs by more
baseline off     the unpruned model itself misses, its score being judged by the same limits in percent of the printed score
not comparable   metric, documents, prompt, layout, budget or the printed number itself; the cause says which
not run          there is no cell
"""

from typing import Any, NamedTuple

from secateur.pruners import REGISTRY, InLLMPruner
from secateur.reporting.comparison import TOKENS, Cell
from secateur.reporting.stats import Interval
from secateur.reporting.tables import changed_fields

MATCH = 1.0
CLOSE = 2.5
MEASURED = {"mean_phi"}  # fields a first pass over the task finds, no choice
VERDICTS = ("match", "close", "miss", "baseline off", "not comparable", "not run")


class Verdict(NamedTuple):
    verdict: str
    cause: str = ""


def judge(printed: float, own: Interval) -> Verdict:
    """Compare a printed value with ours, both in percent."""
    difference = own.value - printed
    if abs(difference) <= MATCH:
        return Verdict("match")
    if own.low <= printed <= own.high:
        return Verdict("match", f"{difference:+.1f} points, inside the interval")
    return Verdict("close" if abs(difference) <= CLOSE else "miss", f"{difference:+.1f} points")


def judge_method(printed: float, own: Interval, unpruned: Verdict) -> Verdict:
    """Judge a pruned row in percent of the unpruned rows, given the verdict on ours."""
    verdict = judge(printed, own)
    if unpruned.verdict != "miss":
        return verdict
    apart = f", {verdict.cause}" if verdict.cause else ""
    return Verdict(
        "baseline off", f"unpruned row {unpruned.cause}; relative to it: {verdict.verdict}{apart}"
    )


def choices(cell: Cell, model: dict[str, Any]) -> list[str]:
    """Fields of a cell's method that are neither the defaults nor what the model's config sets."""
    changed = changed_fields(
        cell.record["identity"]["pruner"], model.get("pruner_fields", {}).get(cell.name, {})
    )
    return [f"{name}={value}" for name, value in changed.items() if name not in MEASURED]


def foreign(cell: Cell, inputs: dict[str, Any]) -> str:
    """What in a cell's setting is not that of a table, or nothing; `inputs` are the model settings the table needs."""
    identity = cell.record["identity"]
    if identity["limit"] is not None:
        return f"only the first {identity['limit']} documents"
    other = [f"{name} is {identity['model'].get(name)}, not {value}" for name, value in inputs.items()
             if identity["model"].get(name) != value]  # fmt: skip
    return ", ".join(other)


def off_budget(cell: Cell, full_tokens: int | None, keep: float | None) -> str:
    """Where a cell's visual tokens are not those of a table's row, or nothing.

    Args:
        full_tokens: visual tokens of an image before pruning; None: they follow the image.
        keep: visual tokens of an image after it, or, up to 1, the share of them; None for the unpruned row.
    """
    before, after = cell.per_image(cell.record["visual_tokens"]), cell.per_image(cell.tokens)
    if full_tokens is not None and abs(before - full_tokens) > 0.5:
        return f"layout: {before:.0f} visual tokens an image, not {full_tokens}"
    if keep is None or issubclass(
        REGISTRY[cell.name], InLLMPruner
    ):  # inside the LLM a budget names the schedule of a release
        return ""
    kept = keep * before if keep <= 1 else keep
    same = abs(after - kept) <= TOKENS * kept
    return "" if same else f"budget: {after:.1f} visual tokens an image on average, not {kept:.1f}"
