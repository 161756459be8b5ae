"""How often each verdict appears at a true deviation from the paper, by simulation.

python scripts/verdict_power.py                  the table of docs/VERDICTS.md
python scripts/verdict_power.py --changed 1      runs that differ in 1 % of the answers

A simulated paper and its reproduction answer the same documents of the real size. In each of the
two runs some answers change, as they do in half precision: half of them become right, half wrong.
The paper's score is rounded as papers print it. Ours has the true deviation in addition.
"""

import argparse

import numpy as np
import pandas as pd

from secateur.reporting.verdicts import JUDGED, judge
from secateur.tasks import TASKS

SIMULATIONS = 2000
CHANGED = 0.5  # percent of the answers
ACCURACIES = ("mmmu_val", "mmstar", "scienceqa_img", "pope", "gqa")
POINTS = (0.0, -0.5, -1.0, -1.5, -2.0, -3.0)
MME = (0.0, -10.0, -20.0, -30.0, -40.0, -60.0)
# images of MME's categories, two questions each
MME_IMAGES = (30, 30, 30, 30, 147, 170, 200, 200, 200, 20, 70, 20, 20, 20)
RIGHT = 0.75  # share of right answers to MME, near the sums that papers print


def accuracy_noise(rng: np.random.Generator, documents: int, changed: float) -> np.ndarray:
    """Changes [SIMULATIONS] of an accuracy between a run and the mean of runs, in points."""
    count = rng.binomial(documents, changed / 100, SIMULATIONS)
    return 100 * (2 * rng.binomial(count, 0.5) - count) / documents


def mme_noise(rng: np.random.Generator, changed: float) -> np.ndarray:
    """Changes [SIMULATIONS] of MME's sum, in points, where `changed` percent of answers change."""
    images = np.repeat(MME_IMAGES, MME_IMAGES)
    right = rng.random((SIMULATIONS, len(images), 2)) < RIGHT
    # as many answers become right as wrong
    chance = changed / 200 / np.where(right, RIGHT, 1 - RIGHT)
    after = right ^ (rng.random(right.shape) < chance)

    def points(answers: np.ndarray) -> np.ndarray:
        return ((50 * answers.sum(axis=2) + 100 * answers.all(axis=2)) / images).sum(axis=1)

    return points(after) - points(right)


def table(changed: float = CHANGED, seed: int = 0) -> pd.DataFrame:
    """Percent of match / close / miss, one row per true deviation, one column per task."""
    rng = np.random.default_rng(seed)
    columns = {}
    for task in ACCURACIES:
        documents = TASKS[task].documents
        assert documents is not None
        noise = [accuracy_noise(rng, documents, changed) for _ in range(2)]
        columns[f"{TASKS[task].title} ({documents})"] = shares(rng, "accuracy", POINTS, noise)
    noise = [mme_noise(rng, changed) for _ in range(2)]
    columns[f"MME sum ({TASKS['mme'].documents})"] = shares(rng, "mme_total", MME, noise)
    index = [f"{points:g} ({mme:g} of MME)" for points, mme in zip(POINTS, MME, strict=True)]
    return pd.DataFrame(columns, index=pd.Index(index, name="true deviation"))


def shares(
    rng: np.random.Generator, metric: str, deviations: tuple[float, ...], noise: list[np.ndarray]
) -> list[str]:
    """Percent of each verdict for each deviation; `noise` [SIMULATIONS] of the two runs."""
    low, high, digits = (1500, 1900, 0) if metric == "mme_total" else (40, 80, 1)
    truth = rng.uniform(low, high, SIMULATIONS)
    printed = np.round(truth + noise[0], digits)
    found = []
    for deviation in deviations:
        own = truth + noise[1] + deviation
        verdicts = [judge(*pair, metric).verdict for pair in zip(printed, own, strict=True)]
        found.append(" / ".join(f"{100 * verdicts.count(name) / len(own):.0f}" for name in JUDGED))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--changed",
        type=float,
        default=CHANGED,
        help=f"percent of answers that change from run to run (default: {CHANGED:g})",
    )
    print(table(parser.parse_args().changed).to_markdown(disable_numparse=True))


if __name__ == "__main__":
    main()
