"""The content of a report: tables, figures, documents and provenance of a results folder."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from secateur.families.base import View
from secateur.reporting import (
    comparison,
    gallery,
    images,
    interval_table,
    kept,
    paper_tables,
    render,
)
from secateur.reporting.charts import charts
from secateur.reporting.comparison import Cell
from secateur.reporting.findings import findings
from secateur.reporting.layouts import layouts
from secateur.reporting.provenance import Provenance
from secateur.reporting.report_parts import (
    Entry,
    Panel,
    Picture,
    Published,
    Scene,
    Section,
    Shown,
)
from secateur.reporting.reported import load_reported
from secateur.reporting.versions import Stale, left_out


class Report:
    """The report of a results folder; its figures are drawn into the folder's `figures`.

    Args:
        results: folder of a sweep.
        data_root: folder with the data sets of suites other than shapes; None means the hub.
        documents: (task, document) pairs whose kept tokens to show; none: the first of every task.
        rivals: labels of two methods for the gallery; none: the two best.

    Raises:
        ValueError: the folder has no finished cells.
    """

    def __init__(
        self,
        results: Path,
        resamples: int,
        data_root: Path | None = None,
        documents: Sequence[tuple[str, int]] = (),
        rivals: Sequence[str] = (),
    ) -> None:
        self.results, self.resamples, self.data_root = results, resamples, data_root
        self.documents, self.rivals = documents, rivals
        self._damaged: list[str] = []
        self.stale: list[Stale] = []
        cells = comparison.load(results, self._damaged, self.stale)
        if not cells:
            raise ValueError(f"no finished cells in {results / 'runs'}; run `make sweep` first")
        self.sections = [self._section(group) for group in comparison.settings(cells)]
        self.published = published(cells, resamples)

    @property
    def problems(self) -> list[str]:
        """What is refused or missing, and where."""
        found = [f"REFUSED {message}" for message in self._damaged]
        found += left_out(self.stale)
        found += [
            f"{section.title}: {text}" for section in self.sections for text in section.warnings
        ]
        return found + [
            f"{table.title}: REFUSED: {table.refused}" for table in self.published if table.refused
        ]

    @property
    def refused(self) -> bool:
        sections = any(
            text.startswith("REFUSED") for section in self.sections for text in section.warnings
        )
        return bool(self._damaged) or sections or any(table.refused for table in self.published)

    def _section(self, cells: list[Cell]) -> Section:
        identity = cells[0].record.identity
        origin = Provenance.of(cells)
        section = Section(
            identity.title,
            f"{identity.stem}_{identity.setting}",
            identity.suite.name,
            origin,
            list(origin.doubts),
        )
        try:
            compared = comparison.compare(cells, self.resamples)
        except ValueError as error:
            section.warnings.append(f"REFUSED: {error}")
            return section
        section.findings = findings(compared)
        section.markdown = interval_table.markdown(cells, compared)
        section.rows = {
            str(task): [
                {str(name): value for name, value in row.items()} for row in rows.to_dict("records")
            ]
            for task, rows in compared.groupby("task", sort=False)
        }
        self._charts(section, cells, compared)
        self._documents(section, cells, compared)
        return section

    def _charts(self, section: Section, cells: list[Cell], compared: pd.DataFrame) -> None:
        folder = self.results / "figures" / section.anchor
        folder.mkdir(parents=True, exist_ok=True)
        title = section.title + " (a demonstration)" * section.demonstration
        for chart in charts(cells, compared, self.results, title, section.warnings):
            path = folder / (re.sub("[^a-z0-9.]+", "_", chart.name.lower()) + ".png")
            chart.figure.savefig(path, dpi=110)
            section.charts.append(Picture(path, chart.caption))

    def _documents(self, section: Section, cells: list[Cell], compared: pd.DataFrame) -> None:
        """Add kept tokens and the gallery; without the data sets, the gallery has no pictures."""
        tasks = list(dict.fromkeys(cell.task for cell in cells))
        root = self.results / "data" / "shapes" if section.suite == "shapes" else self.data_root
        try:
            source = images.Documents(section.suite, tasks, root.resolve() if root else None)
        except (FileNotFoundError, ValueError) as error:  # no data, or a task of a local folder
            section.warnings.append(f"No images: {error}")
            source = None
        try:
            if source and any(cell.name != "none" for cell in cells):
                self._kept(section, cells, source)
            self._gallery(section, cells, compared, source)
        except ValueError as error:
            section.warnings.append(f"REFUSED: {error}")

    def _kept(self, section: Section, cells: list[Cell], source: images.Documents) -> None:
        """Add what all methods keep of some documents."""
        try:
            for one in kept.kept_documents(cells, self.results, source, self.documents):
                section.kept.append(_shown(one, section.anchor))
        except kept.NoView as error:
            section.warnings.append(f"No kept tokens: {error}.")

    def _gallery(
        self,
        section: Section,
        cells: list[Cell],
        compared: pd.DataFrame,
        source: images.Documents | None,
    ) -> None:
        """Add documents that one of two methods answers right and the other wrong."""
        section.rivals = gallery.rivals(compared, self.rivals)
        if section.rivals is None:
            section.warnings.append("No gallery: it needs two methods at one budget.")
            return
        model = cells[0].record.identity.model
        for budget in section.rivals.budgets:
            section.counts[budget], found = gallery.disagreements(
                cells, section.rivals, budget, self.results
            )
            entries = section.entries.setdefault(budget, [])
            for item in found:
                row, scenes, panels = item.rows[item.right], [], []
                document = f"{item.task} {row['doc_id']}"
                if source:
                    name = f"{section.anchor}-{budget}-{document}-{item.right}"
                    pictures = source.images(item.task, row)
                    try:
                        seen = kept.views(model, pictures, row)
                    except kept.NoView:
                        seen = [[View(picture, np.zeros((1, 1)))] for picture in pictures]
                    else:
                        panels = [
                            Panel.made(label, kept.masks(model, item.names[label], seen, own))
                            for label, own in item.rows.items()
                        ]
                    scenes = _scenes([view for one in seen for view in one], name)
                answers = [
                    (label, own["answer"], label == item.right) for label, own in item.rows.items()
                ]
                entries.append(
                    Entry(document, row["prompt"], row["target"], answers, scenes, panels)
                )


def _shown(one: kept.Kept, anchor: str) -> Shown:
    panels = {
        budget: [Panel.made(label, masks) for label, masks in sorted(own.items())]
        for budget, own in one.masks.items()
    }
    name = f"{one.task}, document {one.document}"
    return Shown(name, one.row["prompt"], _scenes(one.views, f"{anchor}-{name}"), panels)


def _scenes(views: Sequence[View], name: str) -> list[Scene]:
    stem = re.sub("[^A-Za-z0-9]+", "-", name)
    return [Scene.of(view, f"{stem}-{number}") for number, view in enumerate(views)]


def published(cells: list[Cell], resamples: int) -> list[Published]:
    """Every paper's table beside our cells; tables that have cells come first."""
    numbers, tables = load_reported(), []
    for layout in layouts():
        try:
            table = paper_tables.build(layout, numbers, cells, resamples)
        except ValueError as error:
            tables.append(Published(layout.title, 0, refused=str(error)))
            continue
        run = int((table.cells["verdict"] != "not run").sum())
        tables.append(Published(layout.title, run, render.sheet(table), render.counts(table)))
    return sorted(tables, key=lambda table: -table.run)
