"""Made-up cells as a sweep of the shapes suite stores them, with kept tokens and prompts."""

from pathlib import Path

import pandas as pd
from cells import altered, cell, rows, save
from PIL import Image

from secateur.reporting.comparison import Cell

FULL = 144
# its label on shapes_llava, which has no CLIP text encoder
SPPRUNER = "sppruner relevance_space=llm_embed (reconstruction)"


def grid(
    tasks=("pope", "gqa"), documents=400, limit=400, suite="shapes", **shares: float
) -> list[Cell]:
    """Cells at 16 tokens of methods, by their share of right answers; the unpruned model's is 0.8.

    Each method fails on other documents.
    """
    options = {"suite": suite, "limit": limit, "full": FULL}
    found = [
        cell("shapes_llava", "none", "full", task, rows(task, 0.8, documents), FULL, **options)
        for task in tasks
    ]
    for shift, (method, share) in enumerate(shares.items()):
        found += [
            cell(
                "shapes_llava",
                method,
                "16",
                task,
                rows(task, share, documents, shift),
                16,
                **options,
            )
            for task in tasks
        ]
    return found


def store(results: Path, cells: list[Cell], prompt: str = "Is there a cat?") -> Path:
    """Write the cells into a results folder; returns it."""
    for own in cells:
        keep = int(own.tokens)
        samples = own.rows.assign(
            prompt=prompt,
            visual_tokens=FULL,
            kept_indices=[[list(range(0, FULL, FULL // keep))]] * len(own.rows),
            crops=[[[12, 12]]] * len(own.rows),
        )
        flops = {
            "pruner": None if own.name == "sppruner" else 1e6,
            "first_token": 1e9 + 1e6 * keep,
        }
        save(results, Cell(altered(own.record, {"flops": flops}), samples))
    return results


class Pictures:
    """Stands in for `secateur.reporting.images.Documents`, which imports lmms-eval.

    Every document has a picture.
    """

    def __init__(self, suite: str, tasks: list[str], data_root: Path | None) -> None:
        pass

    def images(self, task: str, row: pd.Series) -> list[Image.Image]:
        return [Image.new("RGB", (96, 96), "orange")]
