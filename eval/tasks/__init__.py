"""The table of tasks: a task's entry contains all that the harness knows of it.

Prompts and scoring are lmms-eval's own (`secateur.tasks.load`). An entry adds what lmms-eval does
not say: which metric tables show, how the metric is computed from documents, which documents share
an image.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from secateur.tasks import metrics, usable
from secateur.tasks.metrics import Metric

Sample = Mapping[str, Any]  # a scored document as lmms-eval logs it


def _exact_match(sample: Sample) -> float:
    return float(sample["exact_match"])


def _any_text(sample: Sample) -> bool:
    return True


def _not_rewritten(doc: Mapping[str, Any]) -> bool:
    return False


def _mmmu_rewritten(doc: Mapping[str, Any]) -> bool:
    """Whether the chat form loses text of a question, or puts its images in other places.

    lmms-eval takes a question's images once each, by ascending number, and puts them in the places
    of the text's placeholders from the first on. So a question that names an image twice loses
    text, and one that names image 2 before image 1 gets them in each other's place.
    """
    from lmms_eval.tasks.mmmu.utils import construct_prompt  # lmms-eval takes seconds to import

    named = re.findall(r"<image \d+>", construct_prompt(doc))
    return named != sorted(set(named))


def _no_category(sample: Sample) -> str:
    return ""


@dataclass(frozen=True)
class Task:
    """What the harness knows of one task.

    Attributes:
        name: as lmms-eval names it.
        title: as tables print it.
        folder: lmms-eval's folder with the definition, below `lmms_eval/tasks`.
        dataset: name of the data set on the Hugging Face hub.
        documents: number of documents of the real data set, as lmms-eval 0.7.3 loads it.
        metrics: by their names in results/reported; the first is the headline, which tables show.
        score: 1 for a right answer, 0 for a wrong one, by the task's own scoring.
        usable: whether the task's own scoring could read an answer that has any text.
        rewritten: whether lmms-eval changes a document's text or the order of its images, so that
            the prompt is not the question.
        category: the group in which a document's score is averaged first; empty: no groups.
        image_field: field of a document that names its image; None: every document has its own.
        pairs: the two documents of an image are scored together, so a limit must be even.
        sums: metrics that lmms-eval does not aggregate, and the metrics that they are the sum of.
        category_in_image_id: image ids are "category/file"; old samples, which have no column
            `category`, get it from there.
    """

    name: str
    title: str
    folder: str
    dataset: str
    documents: int
    metrics: Mapping[str, Metric]
    score: Callable[[Sample], float] = _exact_match
    usable: Callable[[Sample], bool] = _any_text
    rewritten: Callable[[Mapping[str, Any]], bool] = _not_rewritten
    category: Callable[[Sample], str] = _no_category
    image_field: str | None = None
    pairs: bool = False
    sums: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    category_in_image_id: bool = False

    @property
    def headline(self) -> str:
        """Name of the metric that tables show."""
        return next(iter(self.metrics))

    def heading(self, metric: str | None = None) -> str:
        """Heading of a table's column with a metric, by default the headline."""
        return f"{self.title} {self.metrics[metric or self.headline].suffix}".rstrip()

    def check_limit(self, limit: int | None) -> None:
        """Check a limit on the number of documents; None means all of them.

        Raises:
            ValueError: the limit is below 1, or it would cut a pair.
        """
        if limit is None:
            return
        if limit < 1:
            raise ValueError(f"limit={limit}: at least 1 document, or limit=null for all")
        if self.pairs and limit % 2:
            raise ValueError(
                f"limit={limit} is odd, and {self.title} scores pairs of questions; "
                f"use limit={limit + 1}"
            )

    def named_metrics(self, results: Mapping[str, Any]) -> dict[str, float]:
        """lmms-eval's aggregates by name, without filter suffixes and standard errors, and `sums`.

        With a limit, a part of a sum may have no documents; it counts as 0.
        """
        found = {
            key.removesuffix(",none"): float(value)
            for key, value in results.items()
            if isinstance(value, int | float) and "stderr" not in key and key != "samples"
        }
        return found | {
            total: sum(found.get(part, 0.0) for part in parts) for total, parts in self.sums.items()
        }

    def is_usable(self, sample: Sample) -> bool:
        """Whether the answer has text that the task's own scoring could read."""
        return bool(usable.answer(sample).strip()) and self.usable(sample)

    def image_id(self, sample: Sample) -> str:
        """Documents with the same id share an image."""
        return str(sample["doc"][self.image_field] if self.image_field else sample["doc_id"])


def _mme(sample: Sample) -> dict[str, Any]:
    return sample.get("mme_perception_score") or sample["mme_cognition_score"]


def _mmmu_score(sample: Sample) -> float:
    from lmms_eval.tasks.mmmu.utils import evaluate_mmmu  # lmms-eval takes seconds to import

    return float(evaluate_mmmu([sample["mmmu_acc"]])[1]["acc"])


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="pope",
            title="POPE",
            folder="pope",
            dataset="lmms-lab-encoder/POPE",
            documents=9000,
            metrics={
                "pope_f1": metrics.POPE_F1,
                "pope_accuracy": metrics.accuracy("pope_accuracy", suffix="accuracy"),
            },
            score=lambda sample: sample["pope_accuracy"]["score"],
            usable=usable.pope,
            image_field="image_source",
        ),
        Task(
            name="scienceqa_img",
            title="SQA",
            folder="scienceqa",
            dataset="lmms-lab-encoder/ScienceQA",
            documents=2017,
            metrics={"accuracy": metrics.accuracy("exact_match")},
            usable=usable.scienceqa,
        ),
        Task(
            name="gqa",
            title="GQA",
            folder="gqa",
            dataset="lmms-lab-encoder/GQA",
            documents=12578,
            metrics={"accuracy": metrics.accuracy("exact_match")},
            image_field="imageId",
        ),
        Task(
            name="mme",
            title="MME",
            folder="mme",
            dataset="lmms-lab-encoder/MME",
            documents=2374,
            metrics={"mme_total": metrics.MME_TOTAL, "mme_perception": metrics.MME_PERCEPTION},
            score=lambda sample: _mme(sample)["score"],
            usable=usable.mme,
            category=lambda sample: _mme(sample)["category"],
            image_field="question_id",
            pairs=True,
            sums={"mme_total_score": ("mme_perception_score", "mme_cognition_score")},
            category_in_image_id=True,
        ),
        Task(
            name="mmmu_val",
            title="MMMU",
            folder="mmmu",
            dataset="lmms-lab-encoder/MMMU",
            documents=900,
            metrics={"accuracy": metrics.accuracy("mmmu_acc")},
            score=_mmmu_score,
            usable=usable.mmmu,
            rewritten=_mmmu_rewritten,
        ),
        Task(
            name="mmstar",
            title="MMStar",
            folder="mmstar",
            dataset="Lin-Chen/MMStar",
            documents=1500,
            metrics={"accuracy": metrics.MMSTAR_ACCURACY},
            score=lambda sample: sample["average"]["score"],
            usable=usable.mmstar,
            category=lambda sample: sample["average"]["l2_category"],
        ),
    )
}


def find_task(name: str) -> Task:
    """The entry of a task.

    Raises:
        ValueError: a task that has none.
    """
    if name not in TASKS:
        raise ValueError(
            f"unknown task {name}; known tasks: {', '.join(TASKS)}. "
            "Set tasks=[...] to some of these."
        )
    return TASKS[name]
