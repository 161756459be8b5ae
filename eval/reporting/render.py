"""Paper tables as Markdown, LaTeX, HTML and CSV."""

import html
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from rich.table import Table

from secateur.reporting.layouts import PaperLayout
from secateur.reporting.paper_tables import PaperTable
from secateur.reporting.reported import AVERAGE, OTHER_COLUMNS
from secateur.reporting.verdicts import JUDGED, MME_POINTS, POINTS
from secateur.tasks import TASKS

METHODS = {
    "none": "unpruned",
    "cdpruner": "CDPruner",
    "dart": "DART",
    "divprune": "DivPrune",
    "fastervlm": "FasterVLM",
    "fastv": "FastV",
    "fsr": "FSR",
    "hiprune": "HiPrune",
    "hired": "HiRED",
    "holov": "HoloV",
    "mustdrop": "MustDrop",
    "pact": "PACT",
    "promprune": "PromPrune",
    "promprune_adaptive": "Semantic Prominence-Aware",
    "promprune_fixed_allocation": "Fixed Allocation",
    "promprune_proxy=attention_entropy": "Attn",
    "promprune_proxy=feature_norm_entropy": "Norm",
    "promprune_proxy=spectral_entropy": "Spectral",
    "promprune_stage2=dpp": "DPP",
    "promprune_stage2=facilitylocation": "FL",
    "promprune_stage2=fps": "FPS",
    "prumerge": "LLaVA-PruMerge",
    "prumerge_plus": "LLaVA-PruMerge+",
    "prunesid": "PruneSID",
    "prunesid_dyn": "PruneSID-Dyn",
    "prunesid_ascend": "Ascend",
    "prunesid_descend": "Descend",
    "prunesid_group=kmeans": "kmeans",
    "prunesid_group=random": "random",
    "prunesid_w_o_nms": "w/o NMS",
    "prunesid_w_o_psca": "w/o PSCA",
    **{f"prunesid_k={groups}": f"K = {groups}" for groups in (8, 16, 32, 48, 60)},
    **{f"prunesid_alpha={alpha}": f"alpha = {alpha}" for alpha in (24, 28, 32, 36, 40)},
    "pyramiddrop": "PyramidDrop",
    "random": "random",
    "scope": "SCOPE",
    "scope_coverage_only": "coverage only",
    "scope_saliency_only": "saliency only",
    "sparsevlm": "SparseVLM",
    "sppruner": "SPpruner",
    "tome": "ToMe",
    "trim": "TRIM",
    "trimtokenator": "TrimTokenator",
    "visionzip": "VisionZip",
    "visionzip_dyn": "VisionZip-Dyn",
    "vispruner": "VisPruner",
    "zspaprune": "ZSPAPrune",
}
LEGEND = (
    "Each cell: printed · ours ± half of the 95 % interval (images resampled) · verdict and "
    "difference (ours minus printed, in the units of the metric). match: at most "
    f"{POINTS.run_to_run:g} points, or {MME_POINTS.run_to_run:g} of MME, besides the rounding of "
    f"the print; close: at most {POINTS.close:g}, or {MME_POINTS.close:g} of MME; else miss; "
    "baseline off: our unpruned score is a miss; undecided: the paper leaves more than one "
    "reading. The interval decides nothing; docs/VERDICTS.md states the rules. "
    "Marked *: not significantly below our best at its budget."
)
SUSPECT = "Marked ?: suspect in the source."
_LATEX = str.maketrans(
    {character: rf"\{character}" for character in "&%$#_{}"}
    | {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": "$<$",
        ">": "$>$",
    }
    | {"±": r"$\pm$", "·": r"$\cdot$", "–": "--", "†": r"$^{\dagger}$"}
)


class Entry(NamedTuple):
    """A cell as text; `own` is empty if it was not run, `verdict` if nothing of its row was."""

    printed: str
    own: str
    verdict: str


class Sheet(NamedTuple):
    """A table as text: the rows under each heading; the notes number the causes."""

    title: str
    header: list[str]
    groups: dict[str, list[tuple[str, list[Entry]]]]
    notes: list[str]


def sheet(table: PaperTable) -> Sheet:
    """A paper table as text, in the paper's order of columns and rows.

    "not run" is said only where something of the row and of the column was run.
    """
    causes: dict[str, int] = {}
    cells_run = table.cells[table.cells["verdict"] != "not run"]
    started = set(cells_run["column"])
    started_rows = set(zip(cells_run["budget"], cells_run["method"], strict=True))
    groups: dict[str, list[tuple[str, list[Entry]]]] = {}
    columns = table.cells[["column", "metric"]].drop_duplicates().itertuples(index=False)
    headers = [_heading(column, metric, table.layout) for column, metric in columns]
    for (budget, method), cells in table.cells.groupby(["budget", "method"], sort=False):
        heading = (
            "All tokens"
            if budget == "full"
            else f"{budget}{'' if str(budget).endswith('%') else ' tokens'}"
        )
        entries = [
            _entry(cell, causes, cell["column"] in started and (budget, method) in started_rows)
            for _, cell in cells.iterrows()
        ]
        groups.setdefault(heading, []).append((METHODS.get(str(method), str(method)), entries))
    reasons = [f"[{number}] {cause}." for cause, number in causes.items()]
    missing = [
        heading
        for heading, column in zip(headers, table.cells["column"].unique(), strict=True)
        if column not in started and column != AVERAGE
    ]
    notes = [LEGEND] * bool(started)
    notes += [SUSPECT] * bool(table.cells["suspect"].any())
    if started and any(not entry.verdict for _, row in chain(*groups.values()) for entry in row):
        without = f" ({', '.join(missing)})" if missing else ""
        notes.append(f"Printed numbers alone: nothing of the row or column{without} was run.")
    return Sheet(table.layout.title, ["Method", *headers], groups, [*notes, *table.notes, *reasons])


def counts(table: PaperTable) -> str:
    """How many cells have which verdict, in words."""
    found = table.cells["verdict"].value_counts()
    run = found.drop("not run", errors="ignore")
    if run.empty:
        return "nothing was run"
    words = [f"{count} {verdict}" for verdict, count in run.items()]
    absent = int(found.get("not run", 0))
    return ", ".join([*words, *[f"{absent} not run"] * bool(absent)])


def _heading(column: str, metric: str, layout: PaperLayout) -> str:
    """Heading of a column: the paper's word for its average, the titles of tasks for the others."""
    return layout.average if column == AVERAGE else heading(column, metric)


def heading(column: str, metric: str) -> str:
    """Heading of a task, with the metric where it has several."""
    if column not in TASKS:
        return OTHER_COLUMNS.get(column, column)
    task = TASKS[column]
    return task.heading(metric) if metric in task.metrics else task.title


def _entry(cell: pd.Series, causes: dict[str, int], started: bool) -> Entry:
    # as the papers print it: one decimal, but MME only with the decimals that it has
    digits = ".1f" if cell["printed"] < 200 else "g"
    printed = (
        "–"
        if pd.isna(cell["printed"])
        else f"{cell['printed']:{digits}}" + "?" * bool(cell["suspect"])
    )
    own = ""
    if pd.notna(cell["reproduced"]):
        own = f"{cell['reproduced']:.1f}" + "*" * bool(cell["tied_best"])
        if pd.notna(cell["low"]):
            own += f" ± {(cell['high'] - cell['low']) / 2:.1f}"
    verdict = cell["verdict"] if started else ""
    if pd.notna(cell["difference"]):
        verdict += f" {cell['difference']:+.1f}"
    if cell["cause"] and cell["verdict"] not in (*JUDGED, "not run"):
        verdict += f" [{causes.setdefault(cell['cause'], len(causes) + 1)}]"
    return Entry(printed, own, verdict)


def show(sheet: Sheet, console: Console) -> None:
    """Print a sheet with its notes; the legend, which all sheets share, is left out."""
    console.print(sheet.title, style="bold")
    view = Table()
    view.add_column(sheet.header[0], overflow="fold")
    for name in sheet.header[1:]:
        view.add_column(name, justify="right")
    for heading, rows in sheet.groups.items():
        view.add_section()
        view.add_row(heading, style="bold")
        for label, entries in rows:
            view.add_row(label, *("\n".join(filter(None, entry)) for entry in entries))
    console.print(view, soft_wrap=False)
    for note in sheet.notes:
        if note != LEGEND:
            console.print(f"- {note}")


def markdown(sheet: Sheet) -> str:
    """A sheet as a Markdown table, with its notes."""
    rule = ["---"] + ["---:"] * (len(sheet.header) - 1)
    lines = [f"# {_md(sheet.title)}", "", _md_row(sheet.header), "|" + "|".join(rule) + "|"]
    for heading, rows in sheet.groups.items():
        lines.append(_md_row([f"**{heading}**", *[""] * (len(sheet.header) - 1)]))
        lines += [
            _md_row([label, *(" · ".join(part for part in entry if part) for entry in entries)])
            for label, entries in rows
        ]
    return "\n".join([*lines, "", *(f"- {_md(note)}" for note in sheet.notes), ""])


def _md(text: str) -> str:
    return (
        html.escape(text, quote=False).replace("|", r"\|").replace("*", r"\*").replace("_", r"\_")
    )


def _md_row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def tex(text: str) -> str:
    """Text as LaTeX prints it."""
    return text.translate(_LATEX)


def latex(sheet: Sheet) -> str:
    r"""A table environment; needs \usepackage{booktabs,graphicx}."""
    width = len(sheet.header)
    lines = [
        r"% \usepackage{booktabs,graphicx}",
        r"\begin{table}",
        rf"\caption{{{tex(sheet.title)}}}",
        r"\resizebox{\linewidth}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * (width - 1)}}}",
        r"\toprule",
        " & ".join(tex(name) for name in sheet.header) + r" \\",
    ]
    for heading, rows in sheet.groups.items():
        lines += [
            r"\midrule",
            rf"\multicolumn{{{width}}}{{l}}{{\emph{{{tex(heading)}}}}} \\",
        ]
        lines += [
            " & ".join([tex(label), *map(_stacked, entries)]) + r" \\" for label, entries in rows
        ]
    lines += [r"\bottomrule", r"\end{tabular}}", r"\par\footnotesize"]
    return "\n".join([*lines, *(tex(note) + r"\par" for note in sheet.notes), r"\end{table}", ""])


def _stacked(entry: Entry) -> str:
    parts = [tex(part) for part in entry if part]
    return r"\begin{tabular}[t]{@{}r@{}}" + r" \\ ".join(parts) + r"\end{tabular}"


def templates() -> Environment:
    """The HTML templates; what is put into them is escaped, and a missing value is an error."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def page(sheet: Sheet) -> str:
    """A self-contained HTML page."""
    return templates().get_template("paper_table.html").render(sheet=sheet)


def write(table: PaperTable, folder: Path) -> list[Path]:
    """Write a table in every format; the CSV has one row per cell. Return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    text = sheet(table)
    paths = [folder / f"{table.layout.stem}.{suffix}" for suffix in ("md", "tex", "html", "csv")]
    for path, content in zip(
        paths,
        (markdown(text), latex(text), page(text), table.cells.to_csv(index=False)),
        strict=True,
    ):
        path.write_text(content, encoding="utf-8")
    return paths
