"""The metrics of the six tasks as functions of sums over documents, so that resampled sums give resampled metrics."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd

# of MME; its other categories are cognition
PERCEPTION = {
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
}


@dataclass(frozen=True)
class Metric:
    """A metric as a function of sums over documents.

    Fields: the name lmms-eval aggregates it under, and the factor from there to what tables print; `terms`, what every document
    adds [documents, k]; `value`, from sums [..., k] to the metric [...]; whether the documents' categories are strata.
    """

    stored: str
    factor: float
    terms: Callable[[pd.DataFrame], np.ndarray]
    value: Callable[[np.ndarray], np.ndarray]
    stratified: bool = False


def _scores(rows: pd.DataFrame) -> np.ndarray:
    return np.stack([rows["score"], np.ones(len(rows))], axis=1)


def _hits(rows: pd.DataFrame) -> np.ndarray:
    """True positives, false positives, false negatives as lmms-eval counts them: an answer other than yes and no is neither."""
    said, truth = (rows[name].str.lower().str.strip() for name in ("answer", "target"))
    return np.stack(
        [(truth == t) & (said == s) for t, s in (("yes", "yes"), ("no", "yes"), ("yes", "no"))],
        axis=1,
    ).astype(float)


def _f1(sums: np.ndarray) -> np.ndarray:
    hits, other = 2 * sums[..., 0], sums[..., 1] + sums[..., 2]
    return 100 * np.divide(hits, hits + other, out=np.zeros_like(hits), where=hits > 0)


def _category_share(rows: pd.DataFrame) -> np.ndarray:
    """MMStar: the mean of category means; the sizes of categories are given, not drawn."""
    sizes = rows.groupby("category")["score"].transform("size")
    return (rows["score"] / sizes / rows["category"].nunique()).to_numpy()[:, None]


def _pair_points(rows: pd.DataFrame) -> np.ndarray:
    """MME: accuracy + accuracy+ (both right) of an image's two questions, in percent, as a share of its category's mean."""
    pairs = rows.groupby("image_id")["score"]
    if (pairs.transform("size") != 2).any():
        raise ValueError("MME scores pairs of questions, and an image here has not exactly two")
    images = rows.groupby("category")["image_id"].transform("nunique")
    return ((50 * rows["score"] + 50 * (pairs.transform("sum") == 2)) / images).to_numpy()[:, None]


def _perception_points(rows: pd.DataFrame) -> np.ndarray:
    return _pair_points(rows) * rows["category"].isin(PERCEPTION).to_numpy()[:, None]


def _percent(sums: np.ndarray) -> np.ndarray:
    return 100 * sums[..., 0] / sums[..., 1]


def _only(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0]


# task -> metrics by the names of results/reported; the first is the headline
METRICS: dict[str, dict[str, Metric]] = {
    "pope": {
        "pope_f1": Metric("pope_f1_score", 100, _hits, _f1),
        "pope_accuracy": Metric("pope_accuracy", 100, _scores, _percent),
    },
    "scienceqa_img": {"accuracy": Metric("exact_match", 100, _scores, _percent)},
    "gqa": {"accuracy": Metric("exact_match", 100, _scores, _percent)},
    "mme": {
        "mme_total": Metric("mme_total_score", 1, _pair_points, _only, stratified=True),
        "mme_perception": Metric(
            "mme_perception_score", 1, _perception_points, _only, stratified=True
        ),
    },
    "mmmu_val": {"accuracy": Metric("mmmu_acc", 100, _scores, _percent)},
    "mmstar": {
        "accuracy": Metric(
            "average", 100, _category_share, lambda sums: 100 * _only(sums), stratified=True
        )
    },
}
HEADLINE = {
    task: next(iter(metrics)) for task, metrics in METRICS.items()
}  # the metric tables show
