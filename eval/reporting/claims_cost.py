"""Claims about FLOPs and time, and claims that nothing can judge."""

from dataclasses import dataclass

import pandas as pd

from secateur.efficiency.bench_stats import ratio
from secateur.efficiency.flops import conventions
from secateur.efficiency.flops_published import (
    CROPS,
    explain,
    layer_tokens,
    model_config,
    visual_tokens,
)
from secateur.reporting.claims import (
    CONTRADICTED,
    NOT_RUN,
    OPEN,
    SUPPORTED,
    UNDECIDED,
    Claim,
    Evidence,
    Finding,
    Printed,
    over_readings,
)

TEXT_TOKENS = 62  # of a prompt besides the image, as scripts/flops.py counts


def half_digit(number: float) -> float:
    """Half of the last digit of a claimed number."""
    return 0.5 * 10.0 ** -len(f"{number:g}".partition(".")[2])


def printed_pair(
    evidence: Evidence, paper: str, model: str, method: str, quantity: str
) -> pd.DataFrame:
    """The printed costs of a method, each with that of the unpruned model in the same table.

    Columns: table, budget, unit, value, unpruned.
    """
    rows = evidence.efficiency
    rows = rows[
        (rows["paper"] == paper) & (rows["model"] == model) & (rows["quantity"] == quantity)
    ]
    base = rows[rows["method"] == "none"].set_index(["table", "unit"])["value"]
    own = rows[rows["method"] == method].join(base.rename("unpruned"), on=["table", "unit"])
    return own.dropna(subset="unpruned")[["table", "budget", "unit", "value", "unpruned"]]


@dataclass(frozen=True, kw_only=True)
class Flops(Claim):
    """A method saves this share of the FLOPs, in percent.

    It is counted from the model's configuration. If one of the conventions of
    `secateur.efficiency.flops` gives the FLOPs that the paper prints, this one is taken, else all.
    """

    percent: float
    model: str
    method: str
    budgets: tuple[str, ...]

    def printed(self, evidence: Evidence) -> Printed:
        own = printed_pair(evidence, self.paper, self.model, self.method, "flops")
        if own.empty:
            return Printed(None, "no table is public")
        saved = 100 - 100 * own["value"] / own["unpruned"]
        texts = [
            f"{row.table}: {row.value:g} of {row.unpruned:g} {row.unit}, {share:.1f} % fewer"
            for row, share in zip(own.itertuples(), saved, strict=True)
        ]
        return Printed(bool((saved >= self._least).all()), "; ".join(texts))

    @property
    def _least(self) -> float:
        return self.percent - half_digit(self.percent)

    def needs(self, evidence: Evidence) -> str:
        return "none: FLOPs are counted from the model's configuration"

    def command(self, evidence: Evidence) -> str:
        return "make claims"

    def judge(self, evidence: Evidence) -> Finding:
        known = explain(evidence.efficiency[evidence.efficiency["paper"] == self.paper])
        known = known[(known["model"] == self.model) & (known["method"] == self.method)]
        words = [
            text.split()[0] for texts in known["explained by"] for text in texts.split("; ") if text
        ]
        config, crops = model_config(self.model), CROPS[self.model]
        full = conventions(
            config, layer_tokens("none", self.model, visual_tokens(self.model)), TEXT_TOKENS, crops
        )
        readings: dict[str, str] = {}
        shares: list[float] = []
        for budget in self.budgets:
            plan = layer_tokens(self.method, self.model, int(budget))
            own = conventions(config, plan, TEXT_TOKENS, crops)
            saved = {name: 100 - 100 * own[name] / full[name] for name in words or own}
            shares += saved.values()
            for verdict, reach in ((SUPPORTED, True), (CONTRADICTED, False)):
                names = [name for name in saved if (saved[name] >= self._least) == reach]
                if names:
                    numbers = _span([saved[name] for name in names])
                    readings[f"{budget} tokens, {numbers} fewer ({', '.join(names)})"] = verdict
        verdict, cause = over_readings(readings)
        if words:  # one budget: it has a printed number
            share = _span([100 - 100 * own["flops_first_token"] / full["flops_first_token"]])
            cause += ", the count that gives the printed FLOPs; with the image encoder and "
            cause += f"the head, up to the first token, {share} fewer"
        return Finding(verdict, cause, f"{_span(shares)} fewer")


def _span(values: list[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return f"{low} %" if low == high else f"{low} to {high} %"


@dataclass(frozen=True, kw_only=True)
class Prefill(Claim):
    """The prefill takes this share less time (`percent`), or is so many times as fast (`times`).

    Judged by the GPU benchmarks of the results folder, in three readings: the LLM's prefill alone,
    with the method itself, and everything up to the first token.
    """

    percent: float = 0
    times: float = 0
    model: str
    method: str
    budget: str

    def printed(self, evidence: Evidence) -> Printed:
        own = printed_pair(evidence, self.paper, self.model, self.method, "prefill").iloc[0]
        factor = own["unpruned"] / own["value"]
        times = f"{own['unpruned']:g} to {own['value']:g} {own['unit']}"
        text = f"{own['table']}: {times}, {self._shown(factor)}"
        return Printed(self._amount(factor) >= self._least, text)

    @property
    def _least(self) -> float:
        claimed = self.percent or self.times
        return claimed - half_digit(claimed)

    def _amount(self, factor: float) -> float:
        """A ratio of times as the claim states it."""
        return 100 - 100 / factor if self.percent else factor

    def _shown(self, factor: float) -> str:
        return f"{self._amount(factor):.1f} {'% less' if self.percent else 'times as fast'}"

    def needs(self, evidence: Evidence) -> str:
        return (
            f"a benchmark on a GPU: {self.model}, unpruned and {self.method} at {self.budget} "
            "(random weights serve)"
        )

    def command(self, evidence: Evidence) -> str:
        return "make bench-gpu"

    def judge(self, evidence: Evidence) -> Finding:
        readings: dict[str, str] = {}
        shown = []
        for device, rows in self._samples(evidence):
            for words, phases in (
                ("LLM alone", ["prefill"]),
                ("with the method", ["captures", "selection", "prefill"]),
                ("up to the first token", ["first_token"]),
            ):
                base, own = (
                    part.sort_values("round")[phases].sum(axis=1)
                    for part in (rows[rows["kind"] == "unpruned"], rows[rows["kind"] == "pruned"])
                )
                value, low, high = ratio(base, own)
                shown.append(
                    f"{self._shown(value)} ({self._amount(low):.1f} to {self._amount(high):.1f}; "
                    f"{words}, {device})"
                )
                readings[f"{words}, {device}"] = (
                    SUPPORTED
                    if self._amount(value) >= self._least
                    else UNDECIDED
                    if self._amount(high) >= self._least
                    else CONTRADICTED
                )
        if not readings:
            return Finding(NOT_RUN, "no benchmark of this model, method and budget on a GPU")
        return Finding(*over_readings(readings), "; ".join(shown))

    def _samples(self, evidence: Evidence) -> list[tuple[str, pd.DataFrame]]:
        """By GPU, the samples of the unpruned model and of the method."""
        bench = evidence.bench
        if bench.empty:
            return []
        pruned = (bench["pruner"] == self.method) & (bench["budget"] == int(self.budget))
        own = bench[
            (bench["model"] == self.model)
            & (bench["geometry"] == "true")
            & ~bench["device"].str.startswith("CPU")
            & ((bench["kind"] == "unpruned") | ((bench["kind"] == "pruned") & pruned))
        ]
        return [
            (str(device), rows)
            for device, rows in own.groupby("device")
            if {"unpruned", "pruned"} <= set(rows["kind"])
        ]


@dataclass(frozen=True, kw_only=True)
class Open(Claim):
    """A claim that no cell can judge; `why` says what it leaves open."""

    why: str

    def printed(self, evidence: Evidence) -> Printed:
        return Printed(None, "no table is public")

    def needs(self, evidence: Evidence) -> str:
        return "none can judge it"

    def command(self, evidence: Evidence) -> str:
        return ""

    def judge(self, evidence: Evidence) -> Finding:
        return Finding(OPEN, self.why)
