"""What a comparison says, in sentences: which methods differ beyond noise."""

import pandas as pd

from secateur.reporting.comparison import FEW_IMAGES
from secateur.reporting.figures import UNPRUNED, task_title, tasks_of
from secateur.reporting.stats import LEVEL


def findings(comparison: pd.DataFrame) -> list[str]:
    """For every budget, which methods differ from the unpruned model and from random beyond noise.

    They are about the average over the tasks or, if it has no intervals, about every task. With
    few images nothing is called a difference.

    Args:
        comparison: of `secateur.reporting.comparison.compare`.
    """
    pruned = comparison[comparison["method"] != UNPRUNED]
    if pruned.empty:
        return ["No pruned cell was run."]
    tasks = tasks_of(pruned)
    average = pruned[pruned["task"] == "average"]
    if average["p_holm"].notna().any():
        tasks = ["average"]
    order = pruned.groupby("budget")["tokens"].median().sort_values(ascending=False).index
    found, few = [], pruned[pruned["few_images"] & (pruned["task"] != "average")]
    if len(few):
        fewest = int(few["images"].min())
        found.append(
            f"Too few images for a statement about noise (as few as {fewest} in a task, and "
            f"intervals need {FEW_IMAGES}): the scores below are of these documents alone."
        )
    for task in tasks:
        rows = pruned[(pruned["task"] == task) & ~pruned["few_images"]]
        where = "" if task == "average" else f"{task_title(task)}: "
        for budget in [budget for budget in order if budget in set(rows["budget"])]:
            own = rows[rows["budget"] == budget]
            size = budget if budget.endswith(("%", "tile")) else f"{budget} tokens"
            if text := _against_unpruned(own):
                found.append(f"{where}{size}, beside the unpruned model: {text}.")
            if text := _against_random(own):
                found.append(f"{where}{size}, beside random: {text}.")
    if tasks == ["average"] and len(found) > bool(len(few)):
        found.append("These sentences are about the average over the tasks.")
    if pruned["over_random"].isna().all():
        found.append(
            "No sentence about random: it needs three seeds of it (pruner=random seeds=0,1,2)."
        )
    return found


def _against_unpruned(rows: pd.DataFrame) -> str:
    """By the paired test, with Holm's correction over the rows of the task."""
    rows = rows[rows["p_holm"].notna()]
    sure = rows["p_holm"] < 1 - LEVEL
    return _sentence(rows, sure & (rows["difference"] < 0), sure & (rows["difference"] > 0))


def _against_random(rows: pd.DataFrame) -> str:
    """By the paired 95 % interval of the difference."""
    rows = rows[rows["over_random_low"].notna()]
    return _sentence(rows, rows["over_random_high"] < 0, rows["over_random_low"] > 0)


def _sentence(rows: pd.DataFrame, below: pd.Series, above: pd.Series) -> str:
    """Who is below, above and neither, beyond noise; empty without rows."""
    if rows.empty:
        return ""
    parts = [
        f"{len(own)} of {len(rows)} methods {what} beyond noise ({', '.join(own)})"
        for what, own in (("lower", rows["method"][below]), ("higher", rows["method"][above]))
        if len(own)
    ]
    rest = rows["method"][~below & ~above]
    if len(rest) == len(rows):
        return f"no difference beyond noise for any of {len(rows)} methods"
    if len(rest):
        parts.append(f"no difference beyond noise for {len(rest)} ({', '.join(rest)})")
    return "; ".join(parts)
