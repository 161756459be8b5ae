"""A report as one self-contained HTML page, and as a summary in Markdown.

Text of models and data is escaped in both.
"""

import base64
import hashlib
import html
import os
from pathlib import Path
from typing import Any

import pandas as pd
from markdown_it import MarkdownIt
from markupsafe import Markup

from secateur.reporting.render import LEGEND, templates
from secateur.reporting.report import Report
from secateur.reporting.report_parts import DEMONSTRATION, Section


def page(report: Report) -> str:
    """The page: it fetches nothing, since images are data URIs.

    Its policy allows no script but its own, which sorts tables, by the hash of its text.
    """
    script = (Path(__file__).parent / "templates" / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = templates()
    environment.filters |= {
        "number": _number,
        "interval": _interval,
        "p": _p,
        "markdown": _markdown,
    }
    return environment.get_template("report.html").render(
        report=report,
        legend=LEGEND,
        demonstration=DEMONSTRATION,
        script=Markup(script),  # a file of ours, which must stay as it was hashed
        script_hash=f"sha256-{digest}",
        most_budgets=max([1, *(section.most_budgets for section in report.sections)]),
    )


def summary(report: Report, folder: Path) -> str:
    """The tables in Markdown, with links to the figures relative to `folder`."""
    lines = ["# Report", ""]
    for suite in sorted({own.suite for own in report.sections if own.demonstration}):
        lines += [f"**Suite {suite}: {DEMONSTRATION}.**", ""]
    for section in report.sections:
        lines += [f"## {section.title}", ""]
        lines += [*(f"- {_escaped(text)}" for text in section.findings), ""]
        lines += [*(f"- {_escaped(text)}" for text in section.warnings), ""]
        if section.rows:
            lines += [_escaped(section.markdown), *_flips(section)]
        lines += [
            f"![{chart.caption}]({os.path.relpath(chart.path, folder)})\n"
            for chart in section.charts
        ]
        lines += [
            *(f"- {name}: {_escaped(text)}" for name, text in section.provenance.facts.items()),
            "",
        ]
    lines += ["## Published tables", ""]
    lines += [
        f"- {table.title}: {table.verdicts or _escaped('REFUSED: ' + table.refused)}"
        for table in report.published
    ]
    return "\n".join(lines) + "\n"


def write(report: Report, folder: Path) -> list[Path]:
    """Write the page and the summary; return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "index.html", folder / "summary.md"]
    paths[0].write_text(page(report), encoding="utf-8")
    paths[1].write_text(summary(report, folder), encoding="utf-8")
    return paths


def _flips(section: Section) -> list[str]:
    """How answers changed against the unpruned model's, over the tasks."""
    rows = pd.DataFrame(
        [row for task, own in section.rows.items() if task != "average" for row in own]
    )
    rows = rows[rows["method"] != "none"].sort_values("tokens", ascending=False, kind="stable")
    groups = rows.groupby(["budget", "method"], sort=False)
    if not len(groups):
        return []
    table = groups[["right_to_wrong", "wrong_to_right"]].sum(min_count=1)
    table["agreement %"] = 100 * groups["agreement"].mean()
    text = (
        table.reset_index()
        .map(lambda value: _number(value, 0))
        .to_markdown(index=False, disable_numparse=True)
    )
    return ["Beside the unpruned model's answers, documents of all tasks:", "", text, ""]


def _escaped(markdown: str) -> str:
    """Without HTML and links."""
    return html.escape(markdown, quote=False).replace("[", r"\[")


def _markdown(text: str) -> Markup:
    """Markdown as HTML: tables, lists, emphasis and code only; HTML in it becomes text.

    Its tables scroll by themselves and can be sorted.
    """
    rendered = MarkdownIt("zero").enable(["table", "list", "emphasis", "backticks"]).render(text)
    hint = '<p class="hint">The table is wide: scroll it sideways.</p>'
    box = f'{hint}\n<div class="scroll sortable intervals"><table>'
    return Markup(rendered.replace("<table>", box).replace("</table>", "</table></div>"))


def _number(value: Any, digits: int = 1) -> str:
    """A number as text, a dash for a missing one; text stays as it is."""
    if isinstance(value, str):
        return value
    return "–" if pd.isna(value) else f"{value:.{digits}f}"


def _interval(row: dict[str, Any], name: str = "") -> str:
    """A column of the comparison with its interval."""
    value = row[name or "value"]
    low, high = row[f"{name}_low" if name else "low"], row[f"{name}_high" if name else "high"]
    return _number(value) if pd.isna(low) else f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _p(value: float) -> str:
    return "–" if pd.isna(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"
