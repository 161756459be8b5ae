"""Metrics as functions of sums over documents, so that resampled sums give resampled metrics."""

from __future__ import annotations  # pandas is for the annotations alone, and slow to import

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

# MME's categories of perception; its other four are cognition
PERCEPTION = {
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
}


@dataclass(frozen=True)
class Metric:
    """A metric as a function of sums over documents.

    Attributes:
        stored: the name under which lmms-eval aggregates it.
        factor: from the stored value to the printed one.
        terms: what every document adds to the sums [documents, k], from its row.
        value: from sums [..., k] to the printed metric [...].
        stratified: the documents' categories are strata: their sizes are given, not drawn.
        highest: the largest possible value, as printed.
        suffix: what a table's heading says after the title of the task.
    """

    stored: str
    factor: float
    terms: Callable[[pd.DataFrame], np.ndarray]
    value: Callable[[np.ndarray], np.ndarray]
    stratified: bool = False
    highest: float = 100
    suffix: str = ""


def accuracy(stored: str, suffix: str = "") -> Metric:
    """The mean score of the documents, in percent."""
    return Metric(stored, 100, _scores, _percent, suffix=suffix)


def _scores(rows: pd.DataFrame) -> np.ndarray:
    return np.stack([rows["score"], np.ones(len(rows))], axis=1)


def _percent(sums: np.ndarray) -> np.ndarray:
    return 100 * sums[..., 0] / sums[..., 1]


def _only(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0]


def _hits(rows: pd.DataFrame) -> np.ndarray:
    """True positives, false positives and false negatives, as lmms-eval counts them.

    An answer other than yes and no is none of the three.
    """
    said, truth = (rows[name].str.lower().str.strip() for name in ("answer", "target"))
    return np.stack(
        [(truth == t) & (said == s) for t, s in (("yes", "yes"), ("no", "yes"), ("yes", "no"))],
        axis=1,
    ).astype(float)


def _f1(sums: np.ndarray) -> np.ndarray:
    hits, other = 2 * sums[..., 0], sums[..., 1] + sums[..., 2]
    return 100 * np.divide(hits, hits + other, out=np.zeros_like(hits), where=hits > 0)


def _category_share(rows: pd.DataFrame) -> np.ndarray:
    """MMStar: shares of the mean of category means."""
    sizes = rows.groupby("category")["score"].transform("size")
    return (rows["score"] / sizes / rows["category"].nunique()).to_numpy()[:, None]


def _pair_points(rows: pd.DataFrame) -> np.ndarray:
    """MME: accuracy plus accuracy+ (both right) of an image's two questions, in percent.

    A document's term is its share of the mean of its category.
    """
    pairs = rows.groupby("image_id")["score"]
    if (pairs.transform("size") != 2).any():
        raise ValueError("MME scores pairs of questions, and an image here has not exactly two")
    images = rows.groupby("category")["image_id"].transform("nunique")
    return ((50 * rows["score"] + 50 * (pairs.transform("sum") == 2)) / images).to_numpy()[:, None]


def _perception_points(rows: pd.DataFrame) -> np.ndarray:
    return _pair_points(rows) * rows["category"].isin(PERCEPTION).to_numpy()[:, None]


POPE_F1 = Metric("pope_f1_score", 100, _hits, _f1, suffix="F1")
# accuracy plus accuracy+ give a category up to 200 points: ten of perception, four of cognition
MME_TOTAL = Metric(
    "mme_total_score", 1, _pair_points, _only, stratified=True, highest=2800, suffix="sum"
)
MME_PERCEPTION = Metric(
    "mme_perception_score",
    1,
    _perception_points,
    _only,
    stratified=True,
    highest=2000,
    suffix="perception",
)
MMSTAR_ACCURACY = Metric(
    "average", 100, _category_share, lambda sums: 100 * _only(sums), stratified=True
)
