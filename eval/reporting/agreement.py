"""How many documents methods answer alike."""

import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from secateur.reporting.comparison import Cell
from secateur.reporting.figures import BLACK, UNPRUNED, short_names


def agreement(cells: Sequence[Cell]) -> dict[str, pd.DataFrame]:
    """The share of documents that two methods answer alike, mean over the tasks.

    Case and spaces at the ends do not count.

    Returns:
        By budget, a matrix of the methods and the unpruned model. NaN: the two did not answer the
        same documents of all tasks.
    """
    answers: dict[tuple[str, str, str], pd.Series] = {
        (cell.budget, cell.method, cell.task): cell.rows.set_index("doc_id")["answer"]
        .str.strip()
        .str.lower()
        .sort_index()
        for cell in cells
    }
    tasks = sorted({cell.task for cell in cells})
    full = sorted({(budget, method) for budget, method, _ in answers if method == UNPRUNED})
    size = {
        budget: np.mean([c.tokens for c in cells if c.budget == budget])
        for budget, method, _ in answers
        if method != UNPRUNED
    }
    found = {}
    for budget in sorted(size, key=lambda budget: -size[budget]):
        rows = full + sorted(
            {(at, method) for at, method, _ in answers if at == budget and method != UNPRUNED}
        )

        def alike(one: tuple[str, str], other: tuple[str, str]) -> float:
            shares = []
            for task in tasks:
                left, right = answers.get((*one, task)), answers.get((*other, task))
                if left is None or right is None or not left.index.equals(right.index):
                    return np.nan
                shares.append(float((left == right).mean()))
            return float(np.mean(shares))

        names = [method for _, method in rows]
        found[budget] = pd.DataFrame(
            [[alike(a, b) for b in rows] for a in rows], index=names, columns=names
        )
    return found


def agreement_matrices(shares: dict[str, pd.DataFrame], caption: str) -> Figure:
    """Draw what `agreement` returns: one matrix per budget, in percent."""
    largest = max(len(matrix) for matrix in shares.values())
    side = max(3.6, 0.42 * largest + 1.6)
    columns = min(len(shares), 2 if largest <= 10 else 1)
    rows = -(-len(shares) // columns)
    figure = Figure(figsize=(side * columns, side * rows + 0.4), layout="constrained")
    figure.suptitle(textwrap.fill(caption, int(12 * side * columns)), fontsize=10)
    for number, (budget, matrix) in enumerate(shares.items()):
        panel = figure.add_subplot(rows, columns, number + 1)
        percents = 100 * matrix.to_numpy()
        panel.imshow(percents, vmin=0, vmax=100, cmap="YlGnBu")
        for i, j in np.ndindex(matrix.shape):
            share = percents[i, j]
            text, color = f"{share:.0f}", "white" if share > 60 else BLACK
            if share != share:
                text = "–"
            panel.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
        names = short_names([str(name) for name in matrix.index])
        labels = [textwrap.fill(names[str(name)], 26) for name in matrix.index]
        panel.set_xticks(range(len(matrix)), labels, rotation=90, fontsize=7)
        panel.set_yticks(range(len(matrix)), labels, fontsize=7)
        panel.set_title(f"budget {budget}: equal answers, %", fontsize=9)
    return figure
