"""One cell of a sweep, model x pruner x budget x task: its identity and its run."""

import contextlib
import io
import json
import os
import platform
import tempfile
import time
from argparse import Namespace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur import lock, source
from secateur.budget import Budget
from secateur.checkpoints import commit_on_hub, fingerprint, locate
from secateur.pruners import InLLMPruner, Pruner
from secateur.records import Environment, Identity, MethodIdentity, Results, Unlisted
from secateur.settings import ModelSettings, SuiteSettings
from secateur.tasks import Task as Entry

# These imports take seconds, and a sweep with nothing to do does not need them.
if TYPE_CHECKING:
    import pandas as pd
    import torch
    from lmms_eval.api.task import Task

    from secateur.models import PrunedModel

PACKAGES = ("torch", "transformers", "lmms-eval", "secateur")


class EmptyAnswers(RuntimeError):
    """The model answered no document with any text."""


def identity(
    model: ModelSettings,
    pruner: Pruner | InLLMPruner,
    budget: Budget,
    suite: SuiteSettings,
    task: str,
    limit: int | None,
    seed: int,
) -> Identity:
    """The identity of a cell.

    The unpruned model has no budget. Two digests of the code make edited code run again: that of
    the method, and that of all other code that decides answers.
    """
    entry = suite.find(task)
    defined = {"definition": entry.definition} if entry.definition else {}
    return Identity(
        model=model.identity(fingerprint(model.pretrained, model.revision)),
        pruner=MethodIdentity.of(pruner, pruner.code),
        budget=str(Budget() if pruner.name == "none" else budget),
        suite=suite.identity(),
        task=task,
        limit=limit,
        seed=seed,
        versions=_versions(),
        code=source.code(model.family),
        clip=_clip(model, pruner),
        data=suite.data_commit(entry.dataset) or "",
        **defined,
    )


def _clip(model: ModelSettings, pruner: Pruner | InLLMPruner) -> str:
    if model.clip is None or not pruner.needs & {"clip_patches", "clip_text"}:
        return ""
    return fingerprint(model.clip, "main")


@cache
def _versions() -> dict[str, str]:
    """The installed version of each of `PACKAGES`; `version` parses a file on every call."""
    return {package: version(package) for package in PACKAGES}


def environment(device: "torch.device") -> Environment:
    """Where a cell runs. It is not part of the cell's identity."""
    import torch

    return Environment(
        python=platform.python_version(),
        machine=platform.machine(),
        cores=os.cpu_count(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        commit=source.commit(),
        **lock.state(),
    )


def sources(model: ModelSettings, task: "Task") -> dict[str, str | None]:
    """The hub's commit of the weights, if they are from there, and the data set's fingerprint."""
    folder = isinstance(locate(model.pretrained), Path)
    return {
        "weights_commit": None
        if folder or model.weights == "random"
        else commit_on_hub(model.pretrained, model.revision),
        "data_fingerprint": getattr(task.eval_docs, "_fingerprint", None),
    }


def run(
    model: "PrunedModel",
    task: "Task",
    entry: Entry,
    limit: int | None,
    seed: int,
    files: Path | None = None,
) -> "tuple[Results, pd.DataFrame]":
    """Answer and score the first `limit` documents of a task with the method `model` is set to.

    Args:
        files: folder for files that the task writes, such as one for a submission server. None:
            they are deleted.

    Returns:
        The results for the cell's record, and a table with one row per document.

    Raises:
        ValueError: the limit is below 1, or the task does not allow it.
        EmptyAnswers: every answer is empty.
        RuntimeError: a metric is NaN, or is not what the documents' scores give.
        Unanswered: the model runs one shard, and other documents have no answer yet.
    """
    import pandas as pd

    from secateur.tasks.load import manager_of

    entry.check_limit(limit)
    name, started = entry.name, time.time()
    printed = io.StringIO()  # some tasks print tables and progress bars
    with (
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
        tempfile.TemporaryDirectory() as scratch,
    ):
        results = _evaluate(
            model=model,
            tasks=[task],
            limit=limit,
            task_manager=manager_of(entry),
            bootstrap_iters=0,
            # without these, samples keep decoded images, and files go to the working directory
            cli_args=Namespace(output_path=str(files or scratch), process_with_media=False),
            # MMMU guesses at random for unparsable answers: only serial scoring is repeatable
            process_docs_parallel=1,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
        )
    metrics = entry.named_metrics(results["results"][name])
    rows = pd.DataFrame([_row(entry, sample, model) for sample in results["samples"][name]])
    # a task with several filters has a sample for each; the first gives the headline
    rows = rows.drop_duplicates("doc_id").sort_values("doc_id", ignore_index=True)
    if not rows["answer"].str.strip().any():
        raise EmptyAnswers(
            f"all {len(rows)} answers of task {name} are empty: the model generates nothing "
            "with this method and budget"
        )
    wrong = [metric for metric, value in metrics.items() if value != value]
    if wrong:
        raise RuntimeError(f"task {name} scored NaN for {', '.join(wrong)}")
    unlisted = {} if entry.listed else {"unlisted": _unlisted(entry, metrics, rows)}
    if entry.listed:
        check_metrics(entry, metrics, rows)
    found = Results(
        metrics=metrics,
        documents=len(rows),
        images=float(rows["images"].mean()),
        visual_tokens=float(rows["visual_tokens"].mean()),
        kept_tokens=float(rows["kept_tokens"].mean()),
        average_tokens=float(rows["average_tokens"].mean()),
        flops=_flops(model, rows),
        empty_answers=int((rows["answer"].str.strip() == "").sum()),
        unusable_answers=int(rows["unusable"].sum()),
        cut_off_answers=int(rows["cut_off"].sum()),
        rewritten_prompts=int(rows["rewritten"].sum()),
        generation_defaults=model.generation_defaults(),
        started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        seconds=float(rows["seconds"].sum()),
        **unlisted,
    )
    return found, rows


def _evaluate(**arguments: Any) -> dict[str, Any]:
    """Call `simple_evaluate` of lmms-eval; an error of a task's scoring is raised as it was.

    lmms-eval scores a document five times before it gives up with an error of its own.
    """
    from lmms_eval.evaluator import simple_evaluate
    from tenacity import RetryError

    try:
        return simple_evaluate(**arguments)
    except RetryError as error:
        raise (error.last_attempt.exception() or error) from error


def check_metrics(entry: Entry, metrics: dict[str, float], rows: "pd.DataFrame") -> None:
    """Check that the documents' scores give the metrics that lmms-eval aggregated.

    Raises:
        RuntimeError: they do not, or the headline is missing.
    """
    if entry.metrics and entry.metrics[entry.headline].stored not in metrics:
        raise RuntimeError(
            f"task {entry.name} has no metric {entry.metrics[entry.headline].stored}; "
            f"lmms-eval gave {', '.join(metrics) or 'none'}"
        )
    for metric in entry.metrics.values():
        if metric.stored in metrics:  # one of a category without documents is missing
            try:
                metric.check(metrics[metric.stored], rows)
            except ValueError as error:
                raise RuntimeError(f"task {entry.name}: {error}") from error


def _unlisted(entry: Entry, metrics: dict[str, float], rows: "pd.DataFrame") -> Unlisted:
    """What reports need to know of the task. Scores of which no mean is the metric are deleted."""
    if not entry.metrics:
        return Unlisted(metric=None, mean=False)
    metric = entry.metrics[entry.headline]
    try:
        check_metrics(entry, metrics, rows)
        mean = bool(rows["score"].between(0, 1).all())
    except RuntimeError:
        if metric.stored not in metrics:
            raise
        mean = False
    if not mean:
        rows["score"] = float("nan")
    return Unlisted(metric=metric.stored, mean=mean)


def _flops(model: "PrunedModel", rows: "pd.DataFrame") -> dict[str, float | None]:
    """Mean FLOPs per document: by phase, and by two conventions of the literature.

    None where a phase is not counted.
    """
    import pandas as pd

    from secateur.efficiency.flops import conventions, count_row

    config = model.model.config

    @cache  # many documents have the same lengths
    def flops(shape: str) -> dict[str, float | None]:
        row = json.loads(shape)
        text = row["prompt_tokens"] - row["layer_tokens"][0]
        habits = conventions(config, row["layer_tokens"], text, row["crops"])
        count = count_row(config, row, model.method)
        return count.record() | {name: habits[name] for name in ("macs_visual", "flops_prompt")}

    columns = ["layer_tokens", "prompt_tokens", "new_tokens", "crops", "sections"]
    shapes = rows[[name for name in columns if name in rows]].to_dict("records")
    for shape in shapes:
        if not isinstance(shape.get("sections"), list):  # NaN in a row without an image
            shape.pop("sections", None)
    found = [flops(json.dumps(shape)) for shape in shapes]
    means = pd.DataFrame(found).astype(float).mean(skipna=False)
    return {str(name): None if value != value else value for name, value in means.items()}


def _row(entry: Entry, sample: dict[str, Any], model: "PrunedModel") -> dict[str, Any]:
    """The row of one document: answer, score, tokens and diagnostics.

    No file holds a lone surrogate: it is written as its escape in Python.
    """
    answer = model.answers[entry.name, sample["doc_id"]]
    unit = {"unit": entry.unit(sample)} if entry.unit else {}
    return {
        "doc_id": sample["doc_id"],
        "image_id": answer.images if entry.image_hash else _writable(entry.image_id(sample)),
        "category": _writable(entry.category(sample)),
        **unit,
        "prompt": _writable(answer.prompt),
        "target": _writable(entry.target(sample)),
        "answer": _writable(answer.text),
        "score": entry.score(sample),
        "unusable": not entry.is_usable(sample),
        "cut_off": answer.cut_off,
        "rewritten": entry.rewritten(sample["doc"]),
        "images": len(answer.audit.visual_tokens),
        "visual_tokens": sum(answer.audit.visual_tokens),
        "kept_tokens": sum(answer.audit.kept_tokens),
        "average_tokens": sum(answer.audit.layer_tokens) / len(answer.audit.layer_tokens),
        "layer_tokens": list(answer.audit.layer_tokens),
        "kept_indices": [list(indices) for indices in answer.audit.kept_indices],
        "crops": [list(grid) for grid in answer.audit.crops],
        **({"sections": [list(g) for g in answer.audit.sections]} if answer.audit.sections else {}),
        "prompt_tokens": answer.audit.prompt_tokens,
        "new_tokens": answer.new_tokens,
        "seconds": answer.seconds,
        **{
            f"diagnostic_{name}": sum(values) / len(values)
            for name, values in answer.audit.diagnostics.items()
            if values
        },
    }


def _writable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()
