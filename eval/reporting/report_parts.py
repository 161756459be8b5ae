"""The parts of a report: the sections of its settings, the published tables, their pictures."""

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from secateur.families.base import View
from secateur.reporting.gallery import Rivals
from secateur.reporting.provenance import Provenance
from secateur.reporting.render import Sheet

DEMONSTRATION = (
    "a demonstration on generated scenes with a tiny model, "
    "which says nothing about any published model"
)
_SIDE = 240  # largest side of an image in the page, in pixels


class Picture(NamedTuple):
    """A picture file with its caption."""

    path: Path
    caption: str

    @property
    def uri(self) -> str:
        """The picture with at most 256 colours, which makes it small."""
        with Image.open(self.path) as image:
            small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        return _uri(small, "png")


class Scene(NamedTuple):
    """A view of a document's image for the page: the picture once, and what is dropped as paths.

    Attributes:
        id: unique in the page.
        uri: the picture.
        width, height: of the picture.
        rows, columns: of its tokens.
    """

    id: str
    uri: str
    width: int
    height: int
    rows: int
    columns: int

    @classmethod
    def of(cls, view: View, name: str) -> "Scene":
        """The view, made smaller if it is large."""
        image = view.image.copy()
        image.thumbnail((_SIDE, _SIDE))
        rows, columns = view.tokens.shape
        return cls(name, _uri(image, "jpeg"), *image.size, rows, columns)


class Panel(NamedTuple):
    """What a method keeps of the scenes of a document.

    Attributes:
        dropped: for every scene, the strokes over what the method drops, as the path of an SVG in
            units of tokens.
    """

    label: str
    kept: int
    of: int
    dropped: list[str]

    @classmethod
    def made(cls, label: str, masks: list[np.ndarray]) -> "Panel":
        """From which tokens of every view are kept."""
        kept, of = sum(int(mask.sum()) for mask in masks), sum(mask.size for mask in masks)
        return cls(label, kept, of, [strokes(mask) for mask in masks])


def strokes(kept: np.ndarray) -> str:
    """Horizontal strokes over the runs of False in [rows, columns], as the path of an SVG."""
    parts = []
    for row, line in enumerate(~kept):
        edges = np.flatnonzero(np.diff(np.concatenate([[False], line, [False]])))
        parts += [
            f"M{start} {row}h{end - start}"
            for start, end in zip(edges[::2], edges[1::2], strict=True)
        ]
    return "".join(parts)


class Shown(NamedTuple):
    """A document and what methods keep of it, by budget."""

    name: str
    prompt: str
    scenes: list[Scene]
    panels: dict[str, list[Panel]]


class Entry(NamedTuple):
    """A document of the gallery; answers as (method, answer, whether it is right)."""

    document: str
    prompt: str
    target: str
    answers: list[tuple[str, str, bool]]
    scenes: list[Scene]
    panels: list[Panel]


@dataclass
class Section:
    """The cells of one setting.

    Attributes:
        title, anchor: heading of the section and its id in the page.
        suite: name of the suite.
        provenance: where the cells come from.
        warnings: what is missing or refused, and why.
        findings: which methods differ beyond noise, in sentences.
        markdown: the comparison as a table.
        rows: rows of the comparison, by task.
        charts: figures of the comparison.
        kept: documents with the tokens that all methods keep.
        rivals: the two methods of the gallery.
        counts: documents that only one rival answers right, by budget, task and method.
        entries: documents of the gallery, by budget.
    """

    title: str
    anchor: str
    suite: str
    provenance: Provenance
    warnings: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    markdown: str = ""
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    charts: list[Picture] = field(default_factory=list)
    kept: list[Shown] = field(default_factory=list)
    rivals: Rivals | None = None
    counts: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    entries: dict[str, list[Entry]] = field(default_factory=dict)

    @property
    def demonstration(self) -> bool:
        return self.suite != "hub"

    @property
    def budgets(self) -> list[str]:
        """The budgets of the kept tokens, from few to many tokens."""
        return list(dict.fromkeys(budget for one in self.kept for budget in one.panels))[::-1]

    @property
    def most_budgets(self) -> int:
        """The largest number of budgets that one choice of the page offers."""
        return max(len(self.budgets), len(self.rivals.budgets) if self.rivals else 0)


@dataclass(frozen=True)
class Published:
    """A paper's table beside what was run of it, or why it was refused."""

    title: str
    run: int
    sheet: Sheet | None = None
    verdicts: str = ""
    refused: str = ""


def _uri(image: Image.Image, kind: str) -> str:
    data = io.BytesIO()
    image.save(data, kind, optimize=True, quality=85)
    return f"data:image/{kind};base64," + base64.b64encode(data.getvalue()).decode()
