"""Made-up cells as a sweep of the shapes suite stores them, with kept tokens and prompts."""

from pathlib import Path

import pandas as pd
from cells import cell, rows
from PIL import Image

from secateur.reporting.comparison import Cell
from secateur.store import Store

FULL = 144
SPPRUNER = "sppruner relevance_space=llm_embed (reconstruction)"  # its label on shapes_llava, which has no CLIP text encoder
ENVIRONMENT = {
    "commit": "abc",
    "device": "cpu",
    "machine": "x86_64",
    "cores": 2,
    "python": "3.11.7",
}


def grid(
    tasks=("pope", "gqa"), documents=400, limit=400, suite="shapes", **shares: float
) -> list[Cell]:
    """Cells at 16 tokens of methods by their share of right answers, beside an unpruned 0.8; other documents fail each."""
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
        )
        record = {key: value for key, value in own.record.items() if key != "identity"}
        record |= {"environment": ENVIRONMENT, "started": "2026-01-01T00:00:00Z"}
        record["flops"] = {
            "pruner": None if own.name == "sppruner" else 1e6,
            "first_token": 1e9 + 1e6 * keep,
        }
        Store(results).write(own.record["identity"], record, samples)
    return results


class Pictures:
    """Takes the place of `secateur.reporting.gallery.Documents`, which imports lmms-eval: a picture for every document."""

    def __init__(self, suite: str, tasks: list[str], data_root: Path | None) -> None:
        pass

    def images(self, task: str, row: pd.Series) -> list[Image.Image]:
        return [Image.new("RGB", (96, 96), "orange")]
