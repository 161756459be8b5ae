"""The page of the claims, results/claims.md: one row per claim, then the details of each."""

from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from secateur.reporting.claims import NOT_COMPARABLE, Claim, Evidence, Finding, Printed
from secateur.reporting.claims_accuracy import Advantage, Score
from secateur.reporting.claims_best import Best, Retained
from secateur.reporting.claims_cost import Flops, Open, Prefill
from secateur.reporting.layouts import yaml
from secateur.reporting.reported import FOLDER

KINDS: dict[str, type[Claim]] = {
    "advantage": Advantage,
    "best": Best,
    "flops": Flops,
    "open": Open,
    "prefill": Prefill,
    "retained": Retained,
    "score": Score,
}
HEAD = """# Claims

Written by `make claims`; do not edit.

The quantitative claims of five abstracts, in our words (`results/reported/claims.yaml`): what the
paper's own tables say to each, and what was run or counted here. A claimed number is a lower limit:
it is **supported** if ours is at most 0.5 points below (besides the rounding of the print),
**contradicted** if it is more than 2 points below, else **undecided**. docs/VERDICTS.md has the
rules. FLOPs are counted with 62 text tokens; `make flops` has all counts by their names.
"""


class Judged(NamedTuple):
    """A claim with what the paper prints and what was found."""

    claim: Claim
    printed: Printed
    needs: str
    command: str
    finding: Finding


def load(path: Path = FOLDER / "claims.yaml") -> list[Claim]:
    """The claims of a file.

    Raises:
        ValueError: an unknown kind or field, or a missing field.
    """
    found: list[Claim] = []
    for name, entry in yaml(path).items():
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()
        }
        kind = fields.pop("kind", None)
        if kind not in KINDS:
            raise ValueError(f"{path}: {name}: kind {kind!r} is not one of {', '.join(KINDS)}")
        try:
            found.append(KINDS[kind](name=name, **fields))
        except TypeError as error:
            raise ValueError(f"{path}: {name}: {error}") from error
    return found


def samples(results: Path) -> pd.DataFrame:
    """The raw samples of all benchmarks of a results folder."""
    frames = [pd.read_parquet(path) for path in sorted(results.glob("bench/bench-*.parquet"))]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def judge(claims: list[Claim], evidence: Evidence) -> list[Judged]:
    """Judge every claim. Cells that cannot stand in one table are a verdict's cause."""
    return [
        Judged(
            claim,
            claim.printed(evidence),
            claim.needs(evidence),
            claim.command(evidence),
            _finding(claim, evidence),
        )
        for claim in claims
    ]


def _finding(claim: Claim, evidence: Evidence) -> Finding:
    try:
        return claim.judge(evidence)
    except ValueError as error:
        return Finding(NOT_COMPARABLE, str(error))


def page(judged: list[Judged]) -> str:
    """The page in Markdown."""
    lines = [HEAD, "| | paper | claim | its own tables | reproduced | verdict |"]
    lines.append("|---:|---|---|---|---|---|")
    for number, one in enumerate(judged, 1):
        cells = [number, one.claim.paper, one.claim.claim, _support(one.printed).lstrip(": ")]
        cells += [one.finding.value or "-", one.finding.verdict]
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    for number, one in enumerate(judged, 1):
        lines += ["", f"## {number}. {one.claim.paper}: {one.claim.claim}", ""]
        lines += [f"- Source: {one.claim.source}."]
        if one.claim.remark:
            lines.append(f"- {one.claim.remark}")
        lines.append(f"- Its own tables{_support(one.printed)}.")
        lines.append(f"- Cells: {one.needs}.")
        lines += [f"- Command: `{command}`" for command in one.command.split("; ") if command]
        if one.finding.value:
            lines.append(f"- Reproduced: {one.finding.value}.")
        cause = f": {one.finding.cause}" if one.finding.cause else ""
        lines.append(f"- Verdict: **{one.finding.verdict}**{cause.rstrip('.')}.")
    return "\n".join([*lines, ""])


def _support(printed: Printed) -> str:
    if printed.supports is None:
        return f": {printed.text}"
    return f" {'support' if printed.supports else 'contradict'} it: {printed.text}"


def _cell(value: object) -> str:
    return str(value).replace("|", r"\|")
