"""What a paper needs of a results folder: tables, figures, BibTeX, provenance, and a preview."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

from secateur.reporting import comparison, own_table, tables
from secateur.reporting.bibliography import bibliography
from secateur.reporting.charts import charts
from secateur.reporting.comparison import Cell
from secateur.reporting.provenance import Provenance
from secateur.reporting.render import tex
from secateur.reporting.report_parts import DEMONSTRATION
from secateur.reporting.seeds import row_names
from secateur.reporting.versions import Stale, left_out


class Paper(NamedTuple):
    """What was written, and what the reader should know of it."""

    files: list[Path]
    warnings: list[str]


def write(results: Path, out: Path, resamples: int, highlight: Sequence[str] = ()) -> Paper:
    """Write everything into the folder `out`.

    For each setting `table_<setting>.tex` and `.csv`, `provenance_<setting>.tex`, and every figure
    as PDF and PNG in `figures/`; then `methods.bib`, and `preview.tex`, which shows all of it.

    Args:
        results: folder of a sweep.
        highlight: as in `secateur.reporting.figures.looks`.

    Raises:
        ValueError: the folder has no finished cells, or those of a setting cannot be compared; as
            `looks`.
    """
    damaged: list[str] = []
    stale: list[Stale] = []
    cells = comparison.load(results, damaged, stale)
    if not cells:
        raise ValueError(f"no finished cells in {results / 'runs'}; run `make sweep` first")
    warnings = [f"REFUSED {message}" for message in damaged] + left_out(stale)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    files, preview = [], []
    groups = comparison.settings(cells)
    stems = tables.stems([[cell.record for cell in group] for group in groups])
    for group, stem in zip(groups, stems, strict=True):
        compared = comparison.compare(group, resamples)
        identity = group[0].record.identity
        demonstration = f" ({DEMONSTRATION})" if identity.suite.name != "hub" else ""
        names = row_names(cell.record.identity for cell in group)
        methods = {names[cell.method]: cell.name for cell in group}
        table = own_table.latex(compared, identity.title + demonstration, f"tab:{stem}", methods)
        files += [
            _written(out / f"table_{stem}.tex", table),
            _written(out / f"table_{stem}.csv", compared.to_csv(index=False)),
            _written(out / f"provenance_{stem}.tex", provenance(group) + "\n"),
        ]
        preview += [rf"\input{{table_{stem}}}", rf"\input{{provenance_{stem}}}", r"\clearpage"]
        own: list[str] = []
        for chart in charts(group, compared, results, identity.title, own, highlight):
            name = re.sub("[^a-z0-9]+", "_", f"{stem}_{chart.name}".lower())
            path = out / "figures" / f"{name}.pdf"
            files += save(chart.figure, path)
            preview += _figure(f"figures/{name}.pdf", chart.caption)
        warnings += [f"{identity.title}: {text}" for text in [*_doubts(group), *own]]
    files.append(_written(out / "methods.bib", bibliography(cell.name for cell in cells)))
    files.append(_written(out / "preview.tex", _document(preview)))
    return Paper(files, warnings)


def save(figure: Figure, pdf: Path) -> tuple[Path, Path]:
    """Write a figure as PDF and, beside it, as PNG; returns both paths."""
    png = pdf.with_suffix(".png")
    # TrueType fonts instead of Type 3, which the submission systems of conferences refuse
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        figure.savefig(pdf, metadata={"CreationDate": None}, dpi=200)
    figure.savefig(png, dpi=200)
    return pdf, png


def provenance(cells: Sequence[Cell]) -> str:
    """A paragraph in LaTeX: where the numbers of one setting come from."""
    records = [cell.record for cell in cells]
    first = records[0].identity
    model = first.model
    packages = _listed(
        f"{name} {version}" for one in records for name, version in one.identity.versions.items()
    )
    machines = _listed(
        f"{one.environment.device} ({one.environment.machine}, "
        + (f"{one.environment.cores} cores, " if one.environment.cores else "")
        + f"Python {one.environment.python})"
        for one in records
    )
    weights = _listed(
        f"commit {one.environment.weights_commit}"
        if one.environment.weights_commit
        else f"digest {one.identity.model.weights[:12]}"
        for one in records
    )
    started = sorted(one.started[:10] for one in records)
    days = started[0] if started[0] == started[-1] else f"{started[0]} to {started[-1]}"
    qualified = _listed(
        f"{one.identity.pruner.name} ({one.identity.pruner.status})"
        for one in records
        if one.identity.pruner.qualified
    )
    sentences = [
        f"The scores were computed with Secateur, commit {_listed(_commits(cells))}, and the "
        f"task code of lmms-eval, with {packages}",
        "The digest of the lock file is " + _listed(r.environment.lock or "" for r in records)
        if all(one.environment.lock for one in records)
        else "The lock of some cells is not recorded",
        f"The model is {model.pretrained}, revision {model.revision}, {weights}, in {model.dtype}, "
        f"with the attention kernel {model.attn_implementation}",
        f"Suite {first.suite.name}, revision {first.suite.revision}, "
        + ("all documents" if first.limit is None else f"the first {first.limit} documents")
        + f" of each task; data sets: {_data(cells)}",
        f"The {len(records)} cells ran on {machines}, {days}",
    ]
    if qualified:
        sentences.append(f"Not from official code: {qualified}")
    return tex(". ".join(sentences) + ".")


def _commits(cells: Sequence[Cell]) -> set[str]:
    return {cell.record.environment.commit for cell in cells}


def _doubts(cells: Sequence[Cell]) -> list[str]:
    return Provenance.of(cells).doubts


def _data(cells: Sequence[Cell]) -> str:
    """The data set of every task, with its commit on the hub or the digest of its documents."""
    found = []
    for cell in cells:
        data, ran = cell.record.identity.data, cell.record.environment
        version = f"commit {data}" if data else ""
        if not data and ran.data_fingerprint:
            version = f"fingerprint {ran.data_fingerprint}"
        found.append(f"{cell.record.entry.title} ({version or 'version not recorded'})")
    return "; ".join(dict.fromkeys(found))


def _listed(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(values)))


def _figure(path: str, caption: str) -> list[str]:
    return [
        r"\begin{figure}[p]\centering",
        rf"\includegraphics[width=\linewidth,height=0.85\textheight,keepaspectratio]{{{path}}}",
        rf"\caption{{{tex(caption)}}}",
        r"\end{figure}",
        r"\clearpage",
    ]


def _document(parts: list[str]) -> str:
    return "\n".join(
        [
            "% pdflatex preview; bibtex preview; pdflatex preview; pdflatex preview",
            r"\documentclass{article}",
            r"\usepackage[utf8]{inputenc}",
            r"\usepackage{booktabs,graphicx}",
            r"\usepackage[margin=2cm]{geometry}",
            r"\begin{document}",
            *parts,
            r"\nocite{*}",
            r"\bibliographystyle{plain}",
            r"\bibliography{methods}",
            r"\end{document}",
            "",
        ]
    )


def _written(path: Path, text: str) -> Path:
    """Write a file whole, and rename it."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
    return path
