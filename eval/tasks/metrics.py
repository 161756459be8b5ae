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
        digits: after the point, to which lmms-eval rounds the stored value; None: it does not.
    """

    stored: str
    factor: float
    terms: Callable[[pd.DataFrame], np.ndarray]
    value: Callable[[np.ndarray], np.ndarray]
    stratified: bool = False
    highest: float = 100
    suffix: str = ""
    digits: int | None = None

    def of(self, rows: pd.DataFrame) -> float:
        """The metric of some documents, as printed."""
        return float(self.value(self.terms(rows).sum(axis=0)))

    def check(self, stored: float, rows: pd.DataFrame) -> None:
        """Check that the documents give the value that lmms-eval aggregated, to 1e-9.

        Raises:
            ValueError: they do not.
        """
        own = self.of(rows) / self.factor
        allowed = 1e-9 * max(1.0, abs(stored))
        if self.digits is not None:
            allowed += 0.5 * 10**-self.digits
        if not abs(own - stored) <= allowed:  # also NaN
            raise ValueError(
                f"lmms-eval aggregated {self.stored} to {stored!r}, its documents give {own!r}"
            )


def accuracy(stored: str, suffix: str = "", digits: int | None = None) -> Metric:
    """The mean score of the documents, in percent."""
    return Metric(stored, 100, _scores, _percent, suffix=suffix, digits=digits)


def accuracy_of(category: str, stored: str, suffix: str) -> Metric:
    """The mean score of the documents of a category, in percent."""

    def terms(rows: pd.DataFrame) -> np.ndarray:
        return _scores(rows) * rows["category"].eq(category).to_numpy()[:, None]

    return Metric(stored, 100, terms, _percent, suffix=suffix)


def all_right(stored: str) -> Metric:
    """The share of units of which every document is right, in percent.

    lmms-eval stores it in percent too. The column `unit` is "name/number". A unit counts if its
    document number 0 is there.
    """

    def terms(rows: pd.DataFrame) -> np.ndarray:
        parts = rows["unit"].str.rpartition("/")
        counted = parts[2].eq("0").to_numpy()
        right = rows["score"].eq(1).groupby(parts[0]).transform("all").to_numpy()
        return np.stack([counted & right, counted], axis=1).astype(float)

    return Metric(stored, 1, terms, _percent)


def group_means(
    stored: str, of: str | None = None, groups: int | None = None, suffix: str = ""
) -> Metric:
    """The mean of the mean scores of groups of documents, in percent.

    Args:
        of: only documents whose category is "<of>/<group>"; None: of every category. The group of a
            document is the last part of its category.
        groups: how many groups the mean is over; groups without documents count 0. None: only the
            groups that have documents count.
    """

    def terms(rows: pd.DataFrame) -> np.ndarray:
        group = rows["category"].str.rsplit("/", n=1).str[-1].to_numpy()
        member = group[:, None] == np.unique(group)  # [documents, groups]
        if of is not None:
            member &= rows["category"].str.startswith(f"{of}/").to_numpy()[:, None]
        return np.concatenate([rows["score"].to_numpy()[:, None] * member, member], axis=1)

    def value(sums: np.ndarray) -> np.ndarray:
        right, count = np.split(sums, 2, axis=-1)
        means = np.divide(right, count, out=np.zeros_like(right), where=count > 0)
        return 100 * means.sum(axis=-1) / (groups or np.maximum((count > 0).sum(axis=-1), 1))

    return Metric(stored, 100, terms, value, suffix=suffix)


def unlisted(stored: str, mean: bool) -> Metric:
    """The metric of a task that is not in the table of tasks.

    In percent if it is the mean of the documents' scores, else as lmms-eval aggregates it.
    """
    name = stored.partition(",")[0]
    return Metric(stored, 100 if mean else 1, _scores, _percent, highest=np.inf, suffix=name)


def _scores(rows: pd.DataFrame) -> np.ndarray:
    return np.stack([rows["score"], np.ones(len(rows))], axis=1)


def _percent(sums: np.ndarray) -> np.ndarray:
    return 100 * sums[..., 0] / sums[..., 1]


def _of_1000(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / 10


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
# right answers per 1,000, whatever the number of documents
HITS_OF_1000 = Metric("ocrbench_accuracy", 100, _scores, _of_1000)
MMSTAR_ACCURACY = Metric(
    "average", 100, _category_share, lambda sums: 100 * _only(sums), stratified=True
)
