"""Verdicts: does a reproduced number agree with the printed one, and are the two comparable?

Both numbers are of the same documents. So the documents' sampling error is in both alike, and the
verdict follows from their difference alone, ours minus printed, in the units of the metric. A wide
interval over documents is no agreement. docs/VERDICTS.md states the rules for a reader.

match            the difference is at most the rounding of the printed number and the run-to-run
                 tolerance together
close            the difference is larger, but at most the limit for close
miss             the difference is larger than that
baseline off     the unpruned row is a miss: said of that row and of the rows that depend on it
undecided        the verdict depends on what the paper does not say; the cause names the readings
no baseline      our unpruned score is 0: nothing can be relative to it
not comparable   another metric, prompt, layout, budget or set of documents, or a suspect printed
                 number; the cause says which
not run          there is no cell
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from secateur.budget import Budget
from secateur.pruners import REGISTRY, InLLMPruner
from secateur.records import MethodIdentity
from secateur.reporting.comparison import TOKENS, Cell
from secateur.reporting.stats import LEVEL, Signs, sign_test
from secateur.tasks import TASKS


class Tolerance(NamedTuple):
    """Limits of a difference in one unit.

    Attributes:
        run_to_run: how far two runs of one protocol may lie apart (half precision, batch, GPU).
        close: the largest difference that is still close.
        unit: the word that follows a difference.
    """

    run_to_run: float
    close: float
    unit: str


# The defaults' reasons are in docs/VERDICTS.md; scripts/verdict_power.py shows what they find.
POINTS = Tolerance(0.5, 2.0, "points")
MME_POINTS = Tolerance(20.0, 40.0, "MME points")

# a metric that a paper does not name exactly -> what it may be
READINGS = {"pope_as_printed": ("pope_f1", "pope_accuracy")}
MEASURED = {"mean_phi"}  # fields that a first pass over the task measures; they are no choice
PRINTED = "printed number: "  # begins a cause that lies in the paper, not in our cell
JUDGED = ("match", "close", "miss")
VERDICTS = (*JUDGED, "baseline off", "undecided", "no baseline", "not comparable", "not run")


class Verdict(NamedTuple):
    """A verdict, what it rests on, and the difference: ours minus printed, NaN if there is none."""

    verdict: str
    cause: str = ""
    difference: float = float("nan")


def tolerance(metric: str) -> Tolerance:
    """The limits of a metric of `secateur.tasks` or of an average."""
    return MME_POINTS if metric.startswith("mme_") else POINTS


def rounding(printed: float, metric: str) -> float:
    """Half of the last digit of a printed number: papers print 0.1, and MME also in whole points.

    A value read from a file has lost its last zeros, so only a whole MME score counts as whole.
    """
    whole = tolerance(metric) is MME_POINTS and float(printed).is_integer()
    return 0.5 if whole else 0.05


def judge(printed: float, own: float, metric: str) -> Verdict:
    """Compare a printed value with ours, both in the units of `metric`."""
    limits, difference = tolerance(metric), own - printed
    size = round(abs(difference), 6)
    cause = f"{difference:+.1f} {limits.unit}"
    if size <= round(rounding(printed, metric) + limits.run_to_run, 6):
        return Verdict("match", cause, difference)
    return Verdict("close" if size <= limits.close else "miss", cause, difference)


def judge_unpruned(printed: float, own: float, metric: str) -> Verdict:
    """Judge the unpruned row; a miss is "baseline off"."""
    verdict = judge(printed, own, metric)
    return verdict._replace(verdict="baseline off") if verdict.verdict == "miss" else verdict


def judge_method(printed: float, own: float, metric: str, unpruned: Verdict) -> Verdict:
    """Judge a pruned row, given the verdict on our unpruned row."""
    verdict = judge(printed, own, metric)
    if unpruned.verdict != "baseline off":
        return verdict
    return verdict._replace(
        verdict="baseline off",
        cause=f"unpruned row {unpruned.cause}; by itself: {verdict.verdict}, {verdict.cause}",
    )


def over_readings(verdicts: Mapping[str, Verdict]) -> Verdict:
    """One verdict from those of the readings that the paper leaves open.

    It is the readings' own where they agree; the difference is that of the first reading.
    """
    first = next(iter(verdicts.values()))
    if len({verdict.verdict for verdict in verdicts.values()}) == 1:
        return first
    each = "; ".join(
        f"as {name}: {verdict.verdict}, {verdict.cause}" for name, verdict in verdicts.items()
    )
    return Verdict("undecided", f"the paper does not say which it prints; {each}", first.difference)


def with_open_budget(verdict: Verdict, method: str, budget: str) -> Verdict:
    """The verdict on a method inside the LLM, whose budget can be read in two ways.

    A match stands. Otherwise the other reading may be the paper's: undecided.
    """
    if verdict.verdict not in ("close", "miss") or not issubclass(REGISTRY[method], InLLMPruner):
        return verdict
    return verdict._replace(
        verdict="undecided",
        cause=f"budget: {budget} after the cut, or on average over the layers, the paper does not "
        f"say which; as run: {verdict.verdict}, {verdict.cause}",
    )


def with_open_protocol(verdict: Verdict, left_open: str) -> Verdict:
    """The verdict on a task of which papers do not say all; a match stands, else undecided.

    Args:
        left_open: what they do not say; empty: nothing.
    """
    if not left_open or verdict.verdict not in ("close", "miss", "baseline off"):
        return verdict
    return verdict._replace(
        verdict="undecided", cause=f"{left_open}; as run: {verdict.verdict}, {verdict.cause}"
    )


def signs(differences: Mapping[str, Sequence[float]]) -> list[str]:
    """Notes on columns whose differences lean to one side: a sign test over the rows of each.

    Args:
        differences: heading of a column -> ours minus printed of its judged pruned rows.
    """
    found = {column: sign_test(values) for column, values in differences.items()}
    if not found:
        return []
    tested = [one for one in found.values() if one.level > 0]
    leaning = sum(one.p <= 1 - LEVEL for one in tested)
    expected = sum(one.level for one in tested)
    notes = [
        "Signs (ours below : above the print; sign test over the pruned rows): "
        + ", ".join(f"{column} {_sign_text(one)}" for column, one in found.items())
        + "."
    ]
    if tested:
        notes.append(
            f"{leaning} of {len(tested)} tested columns lean to one side at 5 %; "
            f"{expected:.2f} are expected by chance."
        )
    return notes


def _sign_text(one: Signs) -> str:
    test = f"p = {one.p:.2g}" if one.level > 0 else "too few rows for a test"
    return f"{one.below}:{one.above} ({test})"


def choices(method: MethodIdentity, usual: dict[str, Any] | None) -> tuple[str, ...]:
    """Fields of a method that are neither the defaults nor `usual`, those of the model's config."""
    changed = method.changed(usual)
    return tuple(f"{name}={value}" for name, value in changed.items() if name not in MEASURED)


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


def foreign_documents(task: str) -> str:
    """Why papers' numbers of a task are of other documents than its cells; empty if they are not.

    Numbers of tasks that are not here have no cells.
    """
    return TASKS[task].other_documents if task in TASKS else ""


def off_budget(cell: Cell, full_tokens: int | None, keep: float | None) -> str:
    """How a cell's visual tokens differ from those of a table's row; empty if they do not.

    Args:
        full_tokens: visual tokens per image before pruning, as printed; None: the number follows
            the image. With 3 to 5 crops it does so too, and the printed one is that of 5.
        keep: visual tokens per image after pruning, or, if at most 1, their share; None: the
            unpruned row.
    """
    before, after = cell.per_image(cell.record.visual_tokens), cell.per_image(cell.tokens)
    model = cell.record.identity.model
    layout = (cell.name == "none" and model.unpruned_layout) or model.layout
    varies = layout in ("anyres", "crops")
    if full_tokens is not None and not varies and abs(before - full_tokens) > 0.5:
        return f"layout: {before:.0f} visual tokens per image, not {full_tokens}"
    # inside the LLM a budget names the schedule of a release
    if keep is None or issubclass(REGISTRY[cell.name], InLLMPruner):
        return ""
    kept = keep * before if keep <= 1 else keep
    if varies and full_tokens is not None and Budget.parse(cell.budget).per_tile:
        kept *= before / full_tokens
    same = abs(after - kept) <= TOKENS * kept
    return "" if same else f"budget: {after:.1f} visual tokens per image on average, not {kept:.1f}"
