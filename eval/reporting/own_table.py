"""The comparison of a sweep's cells as a LaTeX table for a paper."""

from collections.abc import Hashable
from typing import Any

import pandas as pd

from secateur.reporting.bibliography import key_of
from secateur.reporting.comparison import FEW_IMAGES
from secateur.reporting.figures import UNPRUNED, task_title
from secateur.reporting.render import METHODS, tex
from secateur.reporting.stats import LEVEL
from secateur.reporting.tables import DAGGER

_WIDE = 5  # with more columns of scores a table is shrunk to the width of the line


def latex(comparison: pd.DataFrame, title: str, label: str, names: dict[str, str]) -> str:
    r"""A table environment; needs \usepackage{booktabs,graphicx}, and \cite.

    Args:
        comparison: of `secateur.reporting.comparison.compare`.
        title: of the setting.
        label: for \ref.
        names: label of a row -> name of its method.
    """
    tasks = list(dict.fromkeys(comparison["task"]))
    budgets = comparison[comparison["method"] != UNPRUNED].groupby("budget")["tokens"].median()
    lines = [
        r"% \usepackage{booktabs,graphicx}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_caption(comparison, title)}}}",
        rf"\label{{{label}}}",
    ]
    lines += [r"\resizebox{\linewidth}{!}{%"] * (len(tasks) > _WIDE)
    lines += [
        rf"\begin{{tabular}}{{l{'r' * (1 + len(tasks))}}}",
        r"\toprule",
        " & ".join(["Method", "Tokens", *map(_heading, tasks)]) + r" \\",
        r"\midrule",
    ]
    lines += _rows(comparison[comparison["method"] == UNPRUNED], tasks, names)
    for budget in budgets.sort_values(ascending=False).index:
        text = budget if budget.endswith(("%", "tile")) else f"{budget} tokens"
        lines += [
            r"\midrule",
            rf"\multicolumn{{{2 + len(tasks)}}}{{l}}{{\emph{{{tex(text)}}}}} \\",
            *_rows(comparison[comparison["budget"] == budget], tasks, names),
        ]
    end = r"\end{tabular}" + "}" * (len(tasks) > _WIDE)
    return "\n".join([*lines, r"\bottomrule", end, r"\end{table}", ""])


def _heading(task: str) -> str:
    return r"Average, \%" if task == "average" else tex(task_title(task))


def _rows(own: pd.DataFrame, tasks: list[str], names: dict[str, str]) -> list[str]:
    """The rows of a budget, in their order."""
    lines = []
    for label, rows in own.groupby("method", sort=False):
        by_task = {row["task"]: row for row in rows.to_dict("records")}
        mean = rows[rows["task"] != "average"]["tokens"].mean()
        cells = [_cell(by_task[task]) if task in by_task else "--" for task in tasks]
        lines.append(" & ".join([_method(str(label), names), f"{mean:.1f}", *cells]) + r" \\")
    return lines


def _method(label: str, names: dict[str, str]) -> str:
    """A row's name: the method as papers print it, its fields and status, and its paper."""
    name = names[label]
    key = key_of(name)
    text = METHODS.get(name, name) + label.removeprefix(name)
    return tex(text) + (rf"~\cite{{{key}}}" if key else "")


def _cell(row: dict[Hashable, Any]) -> str:
    value, low, high, sd, p = (row[name] for name in ("value", "low", "high", "sd", "p_holm"))
    if value != value:
        return "--"
    text = f"{value:.1f}" + r"$^{\dagger}$" * (_unusable(row) and row["task"] != "average")
    if row["tied_best"]:
        text = rf"\textbf{{{text}}}"
    small = f"$\\pm${(high - low) / 2:.1f}" if low == low else ""
    small += f" (sd {sd:.1f})" if sd == sd else ""
    if p < 1 - LEVEL and not row["few_images"]:
        small += r" $\downarrow$" if row["difference"] < 0 else r" $\uparrow$"
    return text + (rf" {{\scriptsize {small.strip()}}}" if small else "")


def _unusable(row: dict[Hashable, Any]) -> bool:
    return "answers are unusable" in str(row["mark"])


def _caption(comparison: pd.DataFrame, title: str) -> str:
    parts = [
        f"{tex(title[:1].upper() + title[1:])}.",
        r"Score $\pm$ half of its 95\,\% interval (images resampled).",
    ]
    if (comparison["seeds"] > 1).any():
        parts.append(
            "Rows of several seeds are means over the seeds, intervals over documents and seeds; "
            "in parentheses the standard deviation over the seeds."
        )
    if comparison["tied_best"].any():
        parts.append(r"Bold: not significantly below the best of its budget (paired, Holm, 5\,\%).")
    if (comparison["p_holm"] < 1 - LEVEL).any():
        parts.append(
            r"$\downarrow$, $\uparrow$: below or above the unpruned model (paired, Holm over the "
            r"rows of the task, 5\,\%)."
        )
    if comparison["mark"].str.contains("answers are unusable").any():
        parts.append(
            rf"{tex(DAGGER)}: from some answers the task's own scoring reads nothing; they are "
            "wrong, or guessed."
        )
    if "average" in set(comparison["task"]):
        parts.append("Average: mean of the scores in percent of the unpruned model's.")
    if comparison["few_images"].any():
        parts.append(
            f"Tasks with fewer than {FEW_IMAGES} images have intervals that are too short, and "
            "neither bold nor arrows."
        )
    return " ".join(parts)
