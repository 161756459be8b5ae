"""Named metrics of the six tasks: what lmms-eval aggregated, and the score of one document."""

from typing import Any

from lmms_eval.tasks.mmmu.utils import evaluate_mmmu

_IMAGE_KEY = {"pope": "image_source", "gqa": "imageId", "mme": "question_id"}


def named_metrics(task: str, results: dict[str, Any]) -> dict[str, float]:
    """Aggregates of one task by exact name, without filter suffixes and standard errors; MME's total is the sum of both."""
    metrics = {
        key.removesuffix(",none"): float(value)
        for key, value in results.items()
        if isinstance(value, int | float) and "stderr" not in key and key != "samples"
    }
    if task == "mme":  # with a limit one of the two halves may have no documents
        metrics["mme_total_score"] = sum(
            metrics.get(f"mme_{half}_score", 0.0) for half in ("perception", "cognition")
        )
    return metrics


def document_score(task: str, sample: dict[str, Any]) -> float:
    """1 for a right answer, 0 for a wrong one, by the task's own scoring."""
    if task == "pope":
        return sample["pope_accuracy"]["score"]
    if task == "mme":
        return (sample.get("mme_perception_score") or sample["mme_cognition_score"])["score"]
    if task == "mmmu_val":
        return float(evaluate_mmmu([sample["mmmu_acc"]])[1]["acc"])
    if task == "mmstar":
        return sample["average"]["score"]
    return float(sample["exact_match"])


def category(task: str, sample: dict[str, Any]) -> str:
    """The group a document's score is averaged in first: MME's subtask, MMStar's finer category; empty elsewhere."""
    if task == "mme":
        return (sample.get("mme_perception_score") or sample["mme_cognition_score"])["category"]
    return sample["average"]["l2_category"] if task == "mmstar" else ""


def image_id(task: str, sample: dict[str, Any]) -> str:
    """Documents with the same id share an image."""
    key = _IMAGE_KEY.get(task)
    return str(sample["doc"][key]) if key else str(sample["doc_id"])
