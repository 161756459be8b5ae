"""Verdicts: does a reproduced number agree with the printed one, and are the two comparable?

Absolute scores depend on checkpoint and preprocessing. So a method is judged by its score in
percent of its own unpruned model, against the same ratio of the printed numbers. The documents are
those of the paper, so the paper's numbers are not a second sample.

match            differs by at most `MATCH` points, or our 95 % interval contains the printed ratio
close            differs by at most `CLOSE` points
miss             differs by more
baseline off     the unpruned model itself misses: same limits, in percent of its printed score
not comparable   another metric, prompt, layout, budget or set of documents, or a suspect printed
                 number; the cause says which
not run          there is no cell
"""

from typing import Any, NamedTuple

from secateur.pruners import REGISTRY, InLLMPruner
from secateur.reporting.comparison import TOKENS, Cell
from secateur.reporting.stats import Interval

MATCH = 1.0
CLOSE = 2.5
MEASURED = {"mean_phi"}  # fields that a first pass over the task measures; they are no choice
VERDICTS = ("match", "close", "miss", "baseline off", "not comparable", "not run")


class Verdict(NamedTuple):
    """One of `VERDICTS`, and why."""

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
    expected = model.get("pruner_fields", {}).get(cell.name, {})
    changed = cell.record.identity.pruner.changed(expected)
    return [f"{name}={value}" for name, value in changed.items() if name not in MEASURED]


def foreign(cell: Cell, inputs: dict[str, Any]) -> str:
    """How a cell's setting differs from a table's; empty if it does not.

    Args:
        inputs: the model settings that the table needs.
    """
    identity = cell.record.identity
    if identity.limit is not None:
        return f"only the first {identity.limit} documents"
    other = [
        f"{name} is {own}, not {value}"
        for name, value in inputs.items()
        if (own := getattr(identity.model, name, None)) != value
    ]
    return ", ".join(other)


def off_budget(cell: Cell, full_tokens: int | None, keep: float | None) -> str:
    """How a cell's visual tokens differ from those of a table's row; empty if they do not.

    Args:
        full_tokens: visual tokens per image before pruning; None: the number follows the image.
        keep: visual tokens per image after pruning, or, if at most 1, their share; None: the
            unpruned row.
    """
    before, after = cell.per_image(cell.record.visual_tokens), cell.per_image(cell.tokens)
    if full_tokens is not None and abs(before - full_tokens) > 0.5:
        return f"layout: {before:.0f} visual tokens per image, not {full_tokens}"
    # inside the LLM a budget names the schedule of a release
    if keep is None or issubclass(REGISTRY[cell.name], InLLMPruner):
        return ""
    kept = keep * before if keep <= 1 else keep
    same = abs(after - kept) <= TOKENS * kept
    return "" if same else f"budget: {after:.1f} visual tokens per image on average, not {kept:.1f}"
