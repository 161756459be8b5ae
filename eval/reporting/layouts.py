"""The layouts of the papers' main tables, results/reported/layouts.yaml, and the rows they have."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from omegaconf import OmegaConf

from secateur.reporting.reported import FOLDER

CROPS = 5  # of the 2880 tokens in the tables of LLaVA-NeXT


@dataclass(frozen=True)
class PaperLayout:
    """A table of a paper.

    `average` is the heading of its mean over the columns, empty if it prints none. `unpruned` names
    the paper's table that has the unpruned row, where it is another one.
    """

    stem: str
    paper: str
    table: str
    model: str
    experiment: str
    average: str
    tasks: list[str]
    methods: list[str]
    unpruned: str = ""

    @property
    def title(self) -> str:
        return f"{self.paper} {self.table}, {self.model}"


class Row(NamedTuple):
    """A row of a table; `keep` in tokens or as a share, None for the unpruned row."""

    method: str
    budget: str
    keep: float | None
    texts: frozenset[str]  # how a config may write the budget

    @property
    def key(self) -> str:
        return f"{self.method} at {self.budget}"


def layouts() -> list[PaperLayout]:
    """The layouts of all paper tables."""
    return [
        PaperLayout(stem=stem, **fields) for stem, fields in yaml(FOLDER / "layouts.yaml").items()
    ]


def yaml(path: Path) -> Any:
    """A YAML file as plain dictionaries and lists, interpolations unresolved."""
    return OmegaConf.to_container(OmegaConf.load(path))


def rows_of(layout: PaperLayout, printed: pd.DataFrame) -> list[Row]:
    """The unpruned row, then budgets from large to small with the methods in the paper's order."""
    rows = []
    for row in printed.drop_duplicates(["method", "budget"]).to_dict("records"):
        retention, tokens = row["retention_pct"], row["budget_tokens"]
        keep = (
            None
            if row["method"] == "none"
            else retention / 100
            if pd.isna(tokens)
            else float(tokens)
        )
        texts = {row["budget"], f"{retention:g}%"}
        if layout.model.startswith("llava_next") and not pd.isna(tokens):
            texts.add(f"{tokens // CROPS}/tile")  # as PruneSID and VisionZip count
        rows.append(Row(row["method"], row["budget"], keep, frozenset(texts)))
    order = ["none", *layout.methods]
    return sorted(rows, key=lambda row: (-(row.keep or math.inf), order.index(row.method)))
