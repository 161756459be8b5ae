"""The values and settings of a Weights & Biases run."""

from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import wandb
from matplotlib.figure import Figure

from secateur.reporting import comparison, images
from secateur.reporting.comparison import Cell
from secateur.reporting.stats import RESAMPLES

# half a minute; without a network, wandb's own 20 retries delay the end of a sweep by 15 minutes
RETRIES = 4


def settings() -> wandb.Settings:
    """wandb's settings: quiet, without data of the console, the machine or the checkout."""
    return wandb.Settings(
        silent=True,
        console="off",
        x_disable_stats=True,
        x_disable_meta=True,
        disable_git=True,
        save_code=False,
        x_graphql_retry_max=RETRIES,
    )


def numbers(cell: Cell, notes: list[str]) -> dict[str, float]:
    """Every number of a record, its metrics with intervals, and latency.

    Metrics are in the units of the tables; the headline is also logged as "score". What has no
    interval is added to `notes`.
    """
    content = cell.record.model_dump(exclude={"identity", "environment"}, exclude_unset=True)
    flat = pd.json_normalize(content, sep="/").iloc[0].to_dict()
    values = {
        str(key): float(value)
        for key, value in flat.items()
        if isinstance(value, int | float) and value == value
    }
    task = cell.record.entry
    for metric, definition in task.metrics.items():
        if definition.stored not in cell.record.metrics:
            continue  # a half of MME that has no documents within the limit
        found = {"value": cell.stored(metric)}
        try:
            interval = comparison.estimate(metric, {cell.key: cell}, RESAMPLES).interval(cell.key)
            if interval.low == interval.low:
                found |= {"low": interval.low, "high": interval.high}
            else:
                notes.append(f"No interval of {metric}: resampling the images does not change it.")
        except ValueError as error:
            notes.append(f"No interval of {metric}: {error}.")
        names = [metric, "score"] if metric == task.headline else [metric]
        values |= {f"{name}/{end}": value for name in names for end, value in found.items()}
    seconds = cell.rows["seconds"]
    return values | {
        "answer_seconds/median": float(seconds.median()),
        "answer_seconds/p90": float(seconds.quantile(0.9)),
    }


def table(frame: pd.DataFrame) -> wandb.Table:
    """A table as wandb shows it; missing values are empty."""
    frame = frame.astype(object).where(frame.notna(), None)
    return wandb.Table(
        columns=[str(name) for name in frame],
        data=frame.to_numpy().tolist(),
        allow_mixed_types=True,
    )


def image(figure: Figure, caption: str | None = None) -> wandb.Image:
    """A figure as wandb shows it; the figure is closed."""
    image = wandb.Image(figure, caption=caption)
    plt.close(figure)
    return image


@cache
def documents(suite: str, task: str, data_root: str | None) -> images.Documents:
    """The images of a task, loaded once for all its cells."""
    return images.Documents(suite, [task], Path(data_root).resolve() if data_root else None)
