"""The parts of a report: the sections of its settings, the published tables, their pictures."""

import base64
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from secateur.reporting.gallery import Rivals
from secateur.reporting.provenance import Provenance
from secateur.reporting.render import Sheet

DEMONSTRATION = (
    "a demonstration on generated scenes with a tiny model, "
    "which says nothing about any published model"
)


class Picture(NamedTuple):
    """A picture file with its caption."""

    path: Path
    caption: str

    @property
    def uri(self) -> str:
        kind = "png" if self.path.suffix == ".png" else "jpeg"
        return f"data:image/{kind};base64," + base64.b64encode(self.path.read_bytes()).decode()


class Entry(NamedTuple):
    """A document of the gallery; answers as (method, answer, whether it is right)."""

    document: str
    prompt: str
    target: str
    answers: list[tuple[str, str, bool]]
    picture: Picture | None


@dataclass
class Section:
    """The cells of one setting.

    Attributes:
        title, anchor: heading of the section and its id in the page.
        suite: name of the suite.
        provenance: where the cells come from.
        warnings: what is missing or refused, and why.
        markdown: the comparison as a table.
        rows: rows of the comparison, by task.
        charts: figures of the comparison.
        kept: pictures of kept tokens, as (document, prompt, pictures).
        rivals: the two methods of the gallery.
        counts: documents that only one rival answers right, by task and method.
        entries: documents of the gallery.
    """

    title: str
    anchor: str
    suite: str
    provenance: Provenance
    warnings: list[str] = field(default_factory=list)
    markdown: str = ""
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    charts: list[Picture] = field(default_factory=list)
    kept: list[tuple[str, str, list[Picture]]] = field(default_factory=list)
    rivals: Rivals | None = None
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)

    @property
    def demonstration(self) -> bool:
        return self.suite != "hub"


@dataclass(frozen=True)
class Published:
    """A paper's table beside what was run of it, or why it was refused."""

    title: str
    run: int
    sheet: Sheet | None = None
    verdicts: str = ""
    refused: str = ""
