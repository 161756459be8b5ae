"""Statistics of a comparison: metrics under resampled images, exact tests, tied best methods.

Answers about one image are correlated, so whole images are drawn. Every method sees the same draws,
so differences are paired. Of the n images of a stratum, n - 1 are drawn, and each counts
n / (n - 1) times: this makes the variance unbiased even if a category has few images (the rescaling
bootstrap of Rao and Wu, JASA 83, 1988).
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from secateur.tasks import TASKS, Task
from secateur.tasks.metrics import Metric

RESAMPLES = 10_000
LEVEL = 0.95
POWER = 0.8
_BLOCK = 1000  # resamples at a time


class Interval(NamedTuple):
    """A value, its 95 % interval, and the two-sided p-value of the hypothesis that it is zero.

    NaN: resampling does not change the value, so it gives no interval and no test.
    """

    value: float
    low: float
    high: float
    p: float

    @classmethod
    def of(cls, value: float, draws: np.ndarray) -> "Interval":
        """Percentiles of the resamples [resamples] of a value."""
        draws = np.round(draws, 9)  # sums of equal terms differ in the last bits
        if np.ptp(draws) == 0:
            return cls(float(value), np.nan, np.nan, 1.0 if draws[0] == 0 else np.nan)
        low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        tail = min((draws <= 0).sum(), (draws >= 0).sum())
        return cls(
            float(value),
            float(low),
            float(high),
            float(min(1.0, 2 * (tail + 1) / (len(draws) + 1))),
        )


@dataclass(frozen=True)
class Estimates:
    """A metric of several methods on the same documents.

    Attributes:
        values: by method.
        draws: values of the resamples [resamples, methods].
        freedom: degrees of freedom of the spread: images less strata.
    """

    values: pd.Series
    draws: pd.DataFrame
    freedom: float = np.inf

    def only(self, methods: Sequence[str]) -> "Estimates":
        return Estimates(self.values[list(methods)], self.draws[list(methods)], self.freedom)

    def interval(self, method: str) -> Interval:
        return Interval.of(self.values[method], self.draws[method].to_numpy())

    def difference(self, method: str, other: str) -> Interval:
        """`method` minus `other`."""
        return Interval.of(
            self.values[method] - self.values[other],
            (self.draws[method] - self.draws[other]).to_numpy(),
        )

    def ratio(self, method: str, other: str) -> Interval:
        """`method` in percent of `other`; its p-value means nothing.

        Raises:
            ValueError: `other` scores 0.
        """
        _check_positive(self, other)
        draws = 100 * self.draws[method] / self.draws[other]
        return Interval.of(100 * self.values[method] / self.values[other], draws.to_numpy())

    def over_seeds(self, rows: Mapping[str, Sequence[str]], seed: int = 0) -> "Estimates":
        """Means over the seeds of each method, over documents and over seeds.

        In each resample n - 1 of a method's n seeds are drawn, as images are. A row draws the same
        seeds in every task, and rows draw independently of each other.

        Args:
            rows: name of the row -> the methods in it, one per seed.
        """
        values, draws = {}, {}
        for row, members in rows.items():
            own = self.draws[list(members)].to_numpy()
            if (count := len(members)) > 1:
                rng = np.random.default_rng((seed, zlib.crc32(row.encode())))
                own = np.take_along_axis(own, rng.integers(count, size=(len(own), count - 1)), 1)
            values[row], draws[row] = self.values[list(members)].mean(), own.mean(axis=1)
        return Estimates(pd.Series(values), pd.DataFrame(draws), self.freedom)

    def detectable(self, method: str, other: str) -> float:
        """The smallest true difference that a test at 5 % finds with power 80 %.

        It follows from the spread of the paired difference, with Student's quantiles because the
        spread is itself estimated. NaN: the difference has no spread
        (no document differs, or all do alike), so it cannot be estimated.
        """
        draws = np.round((self.draws[method] - self.draws[other]).to_numpy(), 9)
        if np.ptp(draws) == 0:
            return np.nan
        spread = float(draws.std(ddof=1))
        quantiles = stats.t.ppf([(1 + LEVEL) / 2, POWER], self.freedom)
        return float(quantiles.sum()) * spread

    def tied_best(self, methods: Sequence[str]) -> set[str]:
        """The best of `methods` and those that are not significantly below it.

        The tests are paired, with Holm's correction over the comparisons with the best.
        """
        best = max(methods, key=lambda method: self.values[method])
        others = [method for method in methods if method != best]
        adjusted = holm([self.difference(best, method).p for method in others])
        return {
            best,
            *(method for method, p in zip(others, adjusted, strict=True) if p > 1 - LEVEL),
        }


def estimate(
    task: str | Task,
    metric: str,
    samples: Mapping[str, pd.DataFrame],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimates:
    """A task's metric for several cells, over the same resampled images.

    Args:
        task: an entry, or its name in the table of tasks.
        metric: name of one of its metrics.
        samples: method -> rows of the documents.
        resamples: how often the images are drawn.
        seed: of the draws.

    Raises:
        ValueError: two cells with different documents; a document twice; a score that is NaN or
            not in 0..1; a single image, or a category with a single image; samples without the
            category that the metric needs.
    """
    task = TASKS[task] if isinstance(task, str) else task
    definition = task.metrics[metric]
    ordered = {method: _ordered(task, definition, method, rows) for method, rows in samples.items()}
    first_name, first = next(iter(ordered.items()))
    for method, rows in ordered.items():
        if not rows[["doc_id", "image_id"]].equals(first[["doc_id", "image_id"]]):
            raise ValueError(
                f"{task.name}: {method} and {first_name} answered other documents; "
                "only the same ones can be compared"
            )
    terms = np.stack([definition.terms(rows) for rows in ordered.values()], axis=1)
    strata = first["category"] if definition.stratified else pd.Series("", index=first.index)
    sums = resample(
        terms, first["image_id"], strata, resamples, (seed, zlib.crc32(task.name.encode()))
    )
    names = list(ordered)
    values = definition.value(terms.sum(axis=0))
    return Estimates(
        pd.Series(values, names),
        pd.DataFrame(definition.value(sums), columns=names),
        first["image_id"].nunique() - strata.nunique(),
    )


def resample(
    terms: np.ndarray,
    images: pd.Series,
    strata: pd.Series,
    resamples: int,
    seed: int | tuple[int, ...],
) -> np.ndarray:
    """Sums of the terms [documents, ...] over resampled images: [resamples, ...].

    Raises:
        ValueError: a stratum with a single image.
    """
    cluster, names = pd.factorize(images)
    totals = np.zeros((len(names), *terms.shape[1:]))
    np.add.at(totals, cluster, terms)
    flat = totals.reshape(len(names), -1)
    sums = np.zeros((resamples, flat.shape[1]))
    rng = np.random.default_rng(seed)
    stratum_of = strata.groupby(cluster).first()
    for stratum, members in stratum_of.groupby(stratum_of).groups.items():
        count = len(members)
        if count < 2:
            raise ValueError(
                f"a single image{f' in category {stratum!r}' if stratum else ''}: "
                "no interval can be given"
            )
        own = flat[members.to_numpy()] * (count / (count - 1))
        for start in range(0, resamples, _BLOCK):
            rows = min(_BLOCK, resamples - start)
            drawn = rng.integers(count, size=(rows, count - 1)) + count * np.arange(rows)[:, None]
            weights = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
            sums[start : start + rows] += weights.astype(float) @ own
    return sums.reshape(resamples, *terms.shape[1:])


def relative_average(tasks: Sequence[Estimates], unpruned: str) -> Estimates:
    """The plain mean over tasks of the score in percent of the unpruned model's score.

    This is the "Avg." of SCOPE and PruneSID.

    Raises:
        ValueError: the unpruned model scores 0 in a task.
    """
    for task in tasks:
        _check_positive(task, unpruned)
    values = [100 * task.values / task.values[unpruned] for task in tasks]
    draws = [100 * task.draws.div(task.draws[unpruned], axis=0) for task in tasks]
    return Estimates(
        sum(values[1:], values[0]) / len(tasks),
        sum(draws[1:], draws[0]) / len(tasks),
        min(task.freedom for task in tasks),
    )


def metric_of(task: str | Task, metric: str, method: str, rows: pd.DataFrame) -> float:
    """A task's metric of one cell's samples, as `estimate` computes it, without resampling.

    Raises:
        ValueError: samples that `estimate` refuses for a reason other than too few images.
    """
    task = TASKS[task] if isinstance(task, str) else task
    definition = task.metrics[metric]
    return definition.of(_ordered(task, definition, method, rows))


def _check_positive(estimates: Estimates, unpruned: str) -> None:
    if not estimates.values[unpruned] > 0:
        raise ValueError(f"{unpruned} scores 0 in a task: nothing can be relative to it")


def _ordered(task: Task, metric: Metric, method: str, rows: pd.DataFrame) -> pd.DataFrame:
    """Rows by document, checked, with categories where the metric needs them."""
    rows = rows.sort_values("doc_id", ignore_index=True)
    if rows["doc_id"].duplicated().any():
        raise ValueError(f"{task.name}: {method} has a document twice")
    if not rows["score"].between(0, 1).all():  # also NaN
        raise ValueError(f"{task.name}: {method} has a score that is not a number from 0 to 1")
    if not metric.stratified or "category" in rows:
        return rows
    if not task.category_in_image_id:
        raise ValueError(
            f"{task.name}: the samples have no column category, over which the metric averages; "
            "run the cell again"
        )
    return rows.assign(category=rows["image_id"].str.split("/").str[0])


class Flips(NamedTuple):
    """How pruning changed the unpruned model's answers.

    Attributes:
        right_to_wrong, wrong_to_right: numbers of documents.
        agreement: share of equal answers.
        p: of McNemar's exact test; NaN where two documents share an image.
    """

    right_to_wrong: float
    wrong_to_right: float
    agreement: float
    p: float


def flips(unpruned: pd.DataFrame, pruned: pd.DataFrame) -> Flips:
    """Compare two cells on the same documents.

    The test is two-sided and exact (binomial). It assumes independent documents. Questions about
    one image are not independent, so the test is left out where an image has more than one.
    """
    before, after = (rows.sort_values("doc_id", ignore_index=True) for rows in (unpruned, pruned))
    same = float(
        (before["answer"].str.strip().str.lower() == after["answer"].str.strip().str.lower()).mean()
    )
    if before["score"].isna().any():  # a task without scores of documents
        return Flips(np.nan, np.nan, same, np.nan)
    lost = int(((before["score"] == 1) & (after["score"] < 1)).sum())
    won = int(((before["score"] < 1) & (after["score"] == 1)).sum())
    if before["image_id"].duplicated().any():
        p = np.nan
    else:
        p = float(stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0
    return Flips(lost, won, same, p)


class Signs(NamedTuple):
    """How many differences lie below and above zero.

    Attributes:
        p: of the two-sided exact sign test; NaN without a difference.
        level: the probability that p is at most 5 % by chance; 0 with fewer than six differences.
    """

    below: int
    above: int
    p: float
    level: float


def sign_test(differences: Sequence[float] | np.ndarray) -> Signs:
    """Test whether differences lean to one side; zeros and NaN are left out.

    Under the null hypothesis each difference is as likely below zero as above, independently of
    the others. A cause that all differences share is what the test is to find.
    """
    values = np.round(np.asarray(differences, dtype=float), 9)
    below, above = int((values < 0).sum()), int((values > 0).sum())
    count = below + above
    if not count:
        return Signs(0, 0, np.nan, 0.0)
    counts = np.arange(count + 1)
    chance = stats.binom.pmf(counts, count, 0.5)
    tails = np.minimum(1, 2 * stats.binom.cdf(np.minimum(counts, count - counts), count, 0.5))
    return Signs(below, above, float(tails[below]), float(chance[tails <= 1 - LEVEL].sum()))


def holm(p: Sequence[float] | pd.Series) -> np.ndarray:
    """Holm's adjusted p-values (Scandinavian Journal of Statistics 6, 1979).

    NaN stays NaN and does not count as a test.
    """
    values = np.asarray(p, dtype=float)
    order = np.argsort(values)[: np.isfinite(values).sum()]
    steps = values[order] * np.arange(len(order), 0, -1)
    adjusted = np.full(values.shape, np.nan)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(steps))
    return adjusted
