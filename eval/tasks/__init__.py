"""The table of tasks: a task's entry contains all that the harness knows of it.

Prompts and scoring are lmms-eval's own (`secateur.tasks.load`). An entry adds what lmms-eval does
not say: which metric tables show, how the metric is computed from documents, which documents share
an image. `secateur.tasks.by_name` makes an entry for any other image task of lmms-eval.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.tasks import metrics, usable, variants
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


def _target(sample: Sample) -> str:
    return str(sample["target"])


@dataclass(frozen=True)
class Task:
    """What the harness knows of one task.

    Attributes:
        name: of the task's column in results/reported, or as lmms-eval names it.
        title: as tables print it.
        folder: lmms-eval's folder with the definition, below `lmms_eval/tasks`; or an absolute
            path.
        dataset: name of the data set on the Hugging Face hub.
        documents: number of documents of the real data set, as lmms-eval 0.7.3 loads it. None: not
            known.
        metrics: by their names in results/reported; the first is the headline, which tables show.
            Empty: the task has no score of its own, and another party scores its file of answers.
        score: from 0 for a wrong answer to 1 for a right one, by the task's own scoring.
        usable: whether the task's own scoring could read an answer that has any text.
        rewritten: whether lmms-eval changes a document's text or the order of its images, so that
            the prompt is not the question.
        category: the group in which a document's score is averaged first; empty: no groups.
        image_field: field of a document that names its image; None: every document has its own.
        images: number of different images of the real data set; None: as many as documents, or not
            known.
        image_hash: documents with equal images share an image; no field of theirs names it.
        unit: the documents that are scored together, see `secateur.tasks.metrics.all_right`; None:
            each document is scored alone.
        target: the right answer, as samples show it.
        base: lmms-eval's name, if `name` is another.
        overrides: gives the fields that replace those of lmms-eval's YAML; called when the task is
            loaded.
        other_documents: why numbers of papers are of other documents; such numbers are not
            comparable. Empty: they are of the same.
        open_protocol: what papers leave open about their numbers. Empty: nothing.
        pairs: the two documents of an image are scored together, so a limit must be even.
        whole: the metric means nothing for a part of the documents, so there is no limit.
        sums: metrics that lmms-eval does not aggregate, and the metrics that they are the sum of.
        category_in_image_id: image ids are "category/file"; old samples, which have no column
            `category`, get it from there.
        listed: whether it is one of `TASKS`.
        judge: whether a model over an API scores it.
        definition: digest of the files that define a task that is not listed.
    """

    name: str
    title: str
    folder: str
    dataset: str
    documents: int | None
    metrics: Mapping[str, Metric]
    score: Callable[[Sample], float] = _exact_match
    usable: Callable[[Sample], bool] = _any_text
    rewritten: Callable[[Mapping[str, Any]], bool] = _not_rewritten
    category: Callable[[Sample], str] = _no_category
    image_field: str | None = None
    images: int | None = None
    image_hash: bool = False
    unit: Callable[[Sample], str] | None = None
    target: Callable[[Sample], str] = _target
    base: str = ""
    overrides: Callable[[], Mapping[str, Any]] = dict
    other_documents: str = ""
    open_protocol: str = ""
    pairs: bool = False
    whole: bool = False
    sums: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    category_in_image_id: bool = False
    listed: bool = True
    judge: bool = False
    definition: str = ""

    @property
    def lmms_name(self) -> str:
        """The name of lmms-eval's definition."""
        return self.base or self.name

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
        if self.whole:
            raise ValueError(
                f"limit={limit}: the metric of {self.title} is over all its documents; "
                "use limit=null"
            )
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


def _answers(sample: Sample) -> str:
    """The different answers of a document that several people answered."""
    answers = sample["doc"]["answers"] or []
    texts = [one["answer"] if isinstance(one, Mapping) else one for one in answers]
    return "; ".join(dict.fromkeys(map(str, texts)))


def _field_answer(sample: Sample) -> str:
    return str(sample["doc"]["answer"])


def _mmbench_target(sample: Sample) -> str:
    return str(sample["gpt_eval_score"]["answer"])


def _circle(sample: Sample) -> str:
    """A question of MMBench and the number of its rotation: "241/0" is the question itself."""
    rotation, question = divmod(int(sample["doc"]["index"]), 10**6)
    return f"{question}/{rotation}"


def _mmbench_score(sample: Sample) -> float:
    """Whether lmms-eval's static scoring takes this one rotation as right."""
    import pandas as pd
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    item = sample["gpt_eval_score"]
    one = pd.DataFrame([item])
    return float(
        mmbench_evaluator.eval_sub_data(one, {item["index"]: item["answer"]}, static_only=True)
    )


def _seed_score(sample: Sample) -> float:
    own = sample.get("seed_all") or sample["seed_image"]
    return float(own["pred"].lower().strip() == own["answer"].lower().strip())


def _xlrs_score(sample: Sample) -> float:
    own = sample["xlrs_micro_score"]
    return float(set(own["pred_answer"]) == set(own["answer"]))


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
            images=500,
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
            images=398,
        ),
        Task(
            name="mme",
            title="MME",
            folder="mme",
            dataset="lmms-lab-encoder/MME",
            documents=2374,
            metrics={"mme_total": metrics.MME_TOTAL, "mme_perception": metrics.MME_PERCEPTION},
            images=1187,
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
            metrics={"accuracy": metrics.accuracy("mmmu_acc", digits=5)},
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
        Task(
            name="textvqa",
            title="TextVQA",
            folder="textvqa",
            base="textvqa_val",
            overrides=variants.textvqa_ocr,
            dataset="lmms-lab-encoder/textvqa",
            documents=5000,
            metrics={"accuracy": metrics.accuracy("exact_match")},
            image_field="image_id",
            target=_answers,
        ),
        Task(
            name="textvqa_val",
            title="TextVQA without OCR words",
            folder="textvqa",
            dataset="lmms-lab-encoder/textvqa",
            documents=5000,
            metrics={"accuracy": metrics.accuracy("exact_match")},
            image_field="image_id",
            target=_answers,
        ),
        Task(
            name="mmbench_en",
            title="MMBench",
            folder="mmbench",
            base="mmbench_en_dev_static",
            dataset="lmms-lab-encoder/MMBench",
            documents=4329,
            metrics={"accuracy": metrics.all_right("gpt_eval_score")},
            score=_mmbench_score,
            usable=usable.mmbench,
            image_hash=True,
            unit=_circle,
            target=_mmbench_target,
        ),
        Task(
            name="mmbench_cn",
            title="MMBench-CN",
            folder="mmbench",
            base="mmbench_cn_dev",
            overrides=variants.mmbench_cn_static,
            dataset="lmms-lab-encoder/MMBench",
            documents=4329,
            metrics={"accuracy": metrics.all_right("gpt_eval_score")},
            score=_mmbench_score,
            usable=usable.mmbench,
            image_hash=True,
            unit=_circle,
            target=_mmbench_target,
        ),
        Task(
            name="vizwiz",
            title="VizWiz",
            folder="vizwiz_vqa",
            base="vizwiz_vqa_val",
            dataset="lmms-lab-encoder/VizWiz-VQA",
            documents=4319,
            metrics={"accuracy": metrics.accuracy("exact_match")},
            image_field="question_id",
            target=_answers,
            open_protocol="papers print test-dev, scored by the server, or the validation split",
        ),
        Task(
            name="vqav2",
            title="VQAv2",
            folder="vqav2",
            base="vqav2_val",
            dataset="lmms-lab-encoder/VQAv2",
            documents=214354,
            metrics={"accuracy": metrics.accuracy("exact_match")},
            image_field="image_id",
            images=40504,
            target=_answers,
            other_documents="papers print test-dev, scored by the server; this is the validation "
            "split",
        ),
        Task(
            name="seedbench",
            title="SEED",
            folder="seedbench",
            dataset="lmms-lab-encoder/SEED-Bench",
            documents=17990,
            metrics={"accuracy": metrics.accuracy("seed_all")},
            score=_seed_score,
            usable=usable.seedbench,
            image_hash=True,
            target=_field_answer,
            open_protocol="papers do not say how many frames of a video they show; lmms-eval shows "
            "eight",
        ),
        Task(
            name="seedbench_image",
            title="SEED-I",
            folder="seedbench",
            base="seedbench",
            overrides=variants.seedbench_images,
            dataset="lmms-lab-encoder/SEED-Bench",
            documents=14233,
            metrics={"accuracy": metrics.accuracy("seed_image")},
            score=_seed_score,
            usable=usable.seedbench,
            image_hash=True,
            target=_field_answer,
        ),
        Task(
            name="chartqa",
            title="ChartQA",
            folder="chartqa",
            dataset="lmms-lab-encoder/ChartQA",
            documents=2500,
            metrics={
                "accuracy": metrics.accuracy("relaxed_overall"),
                "human": metrics.accuracy_of("human_test", "relaxed_human_split", suffix="human"),
                "augmented": metrics.accuracy_of(
                    "augmented_test", "relaxed_augmented_split", suffix="augmented"
                ),
            },
            score=lambda sample: float(sample["relaxed_overall"]),
            category=lambda sample: (
                "human_test" if sample["doc"]["type"] == "human_test" else "augmented_test"
            ),
            image_hash=True,
        ),
        Task(
            name="docvqa",
            title="DocVQA",
            folder="docvqa",
            base="docvqa_val",
            dataset="lmms-lab-encoder/DocVQA",
            documents=5349,
            metrics={"accuracy": metrics.accuracy("anls")},
            score=lambda sample: float(sample["anls"]),
            image_hash=True,
            target=_answers,
        ),
        Task(
            name="ocrbench",
            title="OCRBench",
            folder="ocrbench",
            overrides=variants.ocrbench_reset,
            dataset="echo840/OCRBench",
            documents=1000,
            metrics={"accuracy": metrics.HITS_OF_1000},
            score=lambda sample: float(sample["ocrbench_accuracy"]["score"]),
            image_hash=True,
            whole=True,
        ),
        Task(
            name="ai2d",
            title="AI2D",
            folder="ai2d",
            dataset="lmms-lab-encoder/ai2d",
            documents=3088,
            metrics={"accuracy": metrics.accuracy("exact_match,flexible-extract")},
            usable=usable.ai2d,
            image_hash=True,
        ),
        *(
            Task(
                name=f"hrbench_{size}k",
                title=f"HRBench-{size}k",
                folder="hrbench",
                base=f"hrbench{size}k",
                overrides=variants.hrbench_static,
                dataset="DreamMr/HR-Bench",
                documents=800,
                metrics={
                    "accuracy": metrics.group_means("average"),
                    "single": metrics.group_means("single", of="single", suffix="single"),
                    "cross": metrics.group_means("cross", of="cross", suffix="cross"),
                },
                score=lambda sample: float(sample["average"]["gpt_score"]),
                usable=usable.hrbench,
                category=lambda sample: (
                    f"{sample['doc']['category']}/{sample['average']['cycle_category']}"
                ),
                image_hash=True,
            )
            for size in (4, 8)
        ),
        Task(
            name="xlrs",
            title="XLRS",
            folder="xlrs",
            base="xlrs-lite",
            dataset="initiacms/XLRS-Bench-lite",
            documents=2800,
            metrics={
                "accuracy": metrics.group_means("xlrs_macro_score", groups=13, suffix="(macro)"),
                "micro": metrics.accuracy("xlrs_micro_score", suffix="(micro)"),
            },
            score=_xlrs_score,
            usable=usable.xlrs,
            category=lambda sample: sample["xlrs_micro_score"]["sub_category"],
            image_hash=True,
            whole=True,
            open_protocol="the paper does not say whether it prints the macro or the micro average",
        ),
    )
}


def entry(name: str, stored: str | None = None, mean: bool = False) -> Task:
    """The entry of a task for reports: that of the table, or one made from a record.

    Args:
        stored: of a task that is not in the table: its metric, as lmms-eval aggregates it. None: it
            has no score.
        mean: whether that is the mean of the documents' scores.
    """
    if name in TASKS:
        return TASKS[name]
    metric = {} if stored is None else {stored: metrics.unlisted(stored, mean)}
    return Task(name, name, "", "", None, metric, listed=False)


def canonical(name: str) -> str:
    """The name in the table of a task that has another name in lmms-eval; else the name itself."""
    same = (task.name for task in TASKS.values() if task.base == name and task.overrides is dict)
    return name if name in TASKS else next(same, name)


def find_task(name: str, include_path: Path | None = None) -> Task:
    """The entry of a task: of the table, else of lmms-eval or of a local folder.

    Args:
        include_path: folder with YAML files of other tasks.

    Raises:
        ValueError: as `secateur.tasks.by_name.find`.
    """
    if name in TASKS and include_path is None:
        return TASKS[name]
    from secateur.tasks import by_name  # which imports this module

    return by_name.find(name, include_path)
