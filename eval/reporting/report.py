"""The content of a report: tables, figures, documents and provenance of a results folder."""

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from secateur.reporting import (
    ablation,
    comparison,
    figures,
    gallery,
    interval_table,
    paper_tables,
    render,
)
from secateur.reporting.comparison import Cell
from secateur.reporting.costs import first_token_flops, prefill_times
from secateur.reporting.layouts import layouts
from secateur.reporting.overlay import kept_tokens
from secateur.reporting.provenance import Provenance
from secateur.reporting.report_parts import DEMONSTRATION, Entry, Picture, Published, Section
from secateur.reporting.reported import load_reported
from secateur.reporting.versions import Stale, left_out

_PER_PICTURE = 5  # methods per picture of kept tokens


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

    def _picture(self, section: Section, name: str, figure: Figure, caption: str) -> Picture:
        """Draw a figure into its file; the name ends in its format."""
        path = self.results / "figures" / section.anchor / re.sub("[^a-z0-9.]+", "_", name.lower())
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        plt.close(figure)
        return Picture(path, caption)

    def _charts(self, section: Section, cells: list[Cell], compared: pd.DataFrame) -> None:
        caption = section.title + (f": {DEMONSTRATION}" if section.demonstration else "")

        def add(name: str, figure: Figure, text: str) -> None:
            section.charts.append(self._picture(section, name, figure, text))

        try:
            costs = first_token_flops(cells)
        except ValueError as error:
            section.warnings.append(f"No accuracy against FLOPs: {error}")
        else:
            text = (
                "Accuracy against FLOPs until the first token "
                "(tower, projector, pruner, prefill, head), mean over documents."
            )
            if costs.uncounted:
                text += f" Without the cost of the pruner itself: {', '.join(costs.uncounted)}."
            unit, power = (1e9, "10⁹") if costs.mean.max() < 1e11 else (1e12, "10¹²")
            axis = f"FLOPs until the first token, {power}"
            figure = figures.accuracy_against(
                compared, costs.mean / unit, axis, f"Accuracy against FLOPs, {caption}"
            )
            add("accuracy_flops.png", figure, text)
        for number, (axis, times) in enumerate(prefill_times(cells, self.results).items()):
            text = (
                "Accuracy against measured prefill: the bench's median, on its own prompts, "
                "apart from the answers."
            )
            timed = compared.set_index(["task", "method", "budget"]).index.isin(times.index)
            if absent := sorted(
                {
                    f"{row['method']} at {row['budget']}"
                    for row in compared[~timed].to_dict("records")
                }
            ):
                text += f" Not timed: {', '.join(absent)}."
            figure = figures.accuracy_against(
                compared, times, axis, f"Accuracy against measured prefill, {caption}"
            )
            add(f"accuracy_prefill_{number}.png", figure, text)
        add(
            "tasks.png",
            figures.bars(compared, f"Scores by task, {caption}"),
            "Scores by task and budget, with 95 % intervals.",
        )
        for one in ablation.varied(cell.record.identity for cell in cells):
            add(
                f"{one.method}_{one.others}_{one.field}.png",
                ablation.figure(one, compared, caption),
                f"Scores against {one.field} of {one.method}, with 95 % intervals.",
            )
        if shares := figures.agreement(cells):
            text = (
                "Documents that two methods answer alike, mean over the tasks. "
                "Right or wrong does not matter here."
            )
            figure = figures.agreement_matrices(shares, f"Agreement between methods, {caption}")
            add("agreement.png", figure, text)

    def _documents(self, section: Section, cells: list[Cell], compared: pd.DataFrame) -> None:
        """Add kept tokens and the gallery; without the data sets, the gallery has no pictures."""
        tasks = list(dict.fromkeys(cell.task for cell in cells))
        root = self.results / "data" / "shapes" if section.suite == "shapes" else self.data_root
        try:
            source = gallery.Documents(section.suite, tasks, root.resolve() if root else None)
        except (FileNotFoundError, ValueError) as error:  # no data, or a task of a local folder
            section.warnings.append(f"No images: {error}")
            source = None
        try:
            if source:
                self._kept(section, cells, source)
            self._gallery(section, cells, compared, source)
        except ValueError as error:
            section.warnings.append(f"REFUSED: {error}")

    def _kept(self, section: Section, cells: list[Cell], source: gallery.Documents) -> None:
        """Add pictures of the tokens that every method keeps at the smallest budget."""
        pruned = [cell for cell in cells if cell.name != "none"]
        if not pruned:
            return
        budget = min(pruned, key=lambda cell: cell.tokens).budget
        smallest = [cell for cell in pruned if cell.budget == budget]
        firsts = {cell.task: int(cell.rows["doc_id"].min()) for cell in smallest}
        for task, doc in self.documents or firsts.items():
            rows = {}
            for cell in (cell for cell in smallest if cell.task == task):
                own = gallery.samples(cell, self.results, [doc])
                if own.empty:
                    raise ValueError(f"{cell.key} did not answer document {doc} of {task}")
                rows[cell.method] = own.iloc[0]
            if not rows:
                raise ValueError(
                    f"no pruned cell of task {task} at budget {budget}: "
                    f"the kept tokens of document {doc} cannot be shown"
                )
            first = next(iter(rows.values()))
            seen = gallery.as_seen(
                pruned[0].record.identity.model, source.images(task, first), first
            )
            if seen is None:
                section.warnings.append(
                    f"No kept tokens of {task} {doc}: "
                    "its tokens form no single grid over the image."
                )
                continue
            names, pictures = sorted(rows), []
            for start in range(0, len(names), _PER_PICTURE):
                kept = {
                    _wrapped(name): gallery.patches(rows[name])
                    for name in names[start : start + _PER_PICTURE]
                }
                name = f"kept_{task}_{doc}_{start // _PER_PICTURE}.jpg"
                text = f"{task} {doc} at budget {budget}: the image, and what is kept of it."
                pictures.append(
                    self._picture(section, name, kept_tokens(seen[0], kept, seen[1]), text)
                )
            section.kept.append(
                (f"{task}, document {doc}, budget {budget}", first["prompt"], pictures)
            )

    def _gallery(
        self,
        section: Section,
        cells: list[Cell],
        compared: pd.DataFrame,
        source: gallery.Documents | None,
    ) -> None:
        """Add documents that one of two methods answers right and the other wrong."""
        section.rivals = gallery.rivals(compared, self.rivals)
        if section.rivals is None:
            section.warnings.append("No gallery: it needs two methods at one budget.")
            return
        section.counts, found = gallery.disagreements(cells, section.rivals, self.results)
        model = cells[0].record.identity.model
        for item in found:
            document, picture = f"{item.task} {item.row['doc_id']}", None
            images = source.images(item.task, item.row) if source else []
            if images:
                seen = gallery.as_seen(model, images, item.row)
                shown, grid = seen or (images[0], (1, 1))
                figure = kept_tokens(
                    shown,
                    {_wrapped(name): kept for name, kept in item.kept.items()} if seen else {},
                    grid,
                )
                picture = self._picture(section, f"disagree_{document}.jpg", figure, document)
            answers = [(name, text, name == item.right) for name, text in item.answers.items()]
            section.entries.append(
                Entry(document, item.row["prompt"], item.row["target"], answers, picture)
            )


def _wrapped(label: str) -> str:
    return textwrap.fill(label, 22, break_long_words=False)


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
