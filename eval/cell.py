"""One cell of a sweep, model x pruner x budget x task: its identity and its run."""

import contextlib
import io
import os
import platform
import time
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur import lock, source
from secateur.budget import Budget
from secateur.checkpoints import commit_on_hub, fingerprint, locate
from secateur.pruners import InLLMPruner, Pruner
from secateur.records import Environment, Identity, MethodIdentity, Results
from secateur.settings import ModelSettings, SuiteSettings
from secateur.tasks import TASKS, find_task

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
    return Identity(
        model=model.identity(fingerprint(model.pretrained, model.revision)),
        pruner=MethodIdentity.of(pruner, pruner.code),
        budget=str(Budget() if pruner.name == "none" else budget),
        suite=suite.identity(),
        task=task,
        limit=limit,
        seed=seed,
        versions=_versions(),
        code=source.code(),
        clip=_clip(model, pruner),
        data=suite.data_commit(find_task(task).dataset) or "",
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
    model: "PrunedModel", task: "Task", name: str, limit: int | None, seed: int
) -> "tuple[Results, pd.DataFrame]":
    """Answer and score the first `limit` documents of a task with the method `model` is set to.

    Returns:
        The results for the cell's record, and a table with one row per document.

    Raises:
        ValueError: the limit is below 1, or odd for MME, which scores pairs.
        EmptyAnswers: every answer is empty.
        RuntimeError: a metric is NaN.
        Unanswered: the model runs one shard, and other documents have no answer yet.
    """
    import pandas as pd
    from lmms_eval.evaluator import simple_evaluate

    from secateur.tasks.load import task_manager

    find_task(name).check_limit(limit)
    started = time.time()
    printed = io.StringIO()  # some tasks print tables and progress bars
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        results = simple_evaluate(
            model=model,
            tasks=[task],
            limit=limit,
            task_manager=task_manager(),
            bootstrap_iters=0,
            # MMMU guesses at random for unparsable answers: only serial scoring is repeatable
            process_docs_parallel=1,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
        )
    metrics = TASKS[name].named_metrics(results["results"][name])
    rows = pd.DataFrame(
        [_row(name, sample, model) for sample in results["samples"][name]]
    ).sort_values("doc_id", ignore_index=True)
    if not rows["answer"].str.strip().any():
        raise EmptyAnswers(
            f"all {len(rows)} answers of task {name} are empty: the model generates nothing "
            "with this method and budget"
        )
    wrong = [metric for metric, value in metrics.items() if value != value]
    if wrong:
        raise RuntimeError(f"task {name} scored NaN for {', '.join(wrong)}")
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
    )
    return found, rows


def _flops(model: "PrunedModel", rows: "pd.DataFrame") -> dict[str, float | None]:
    """Mean FLOPs per document: by phase, and by two conventions of the literature.

    None where a phase is not counted.
    """
    import pandas as pd

    from secateur.efficiency.flops import conventions, count_row

    config, found = model.model.config, []
    for row in rows.to_dict("records"):
        text = row["prompt_tokens"] - row["layer_tokens"][0]
        habits = conventions(config, row["layer_tokens"], text, row["crops"])
        count = count_row(config, row, model.method)  # type: ignore[arg-type]
        found.append(
            count.record() | {name: habits[name] for name in ("macs_visual", "flops_prompt")}
        )
    means = pd.DataFrame(found).astype(float).mean(skipna=False)
    return {str(name): None if value != value else value for name, value in means.items()}


def _row(task: str, sample: dict[str, Any], model: "PrunedModel") -> dict[str, Any]:
    """The row of one document: answer, score, tokens and diagnostics.

    No file holds a lone surrogate: it is written as its escape in Python.
    """
    entry, answer = TASKS[task], model.answers[task, sample["doc_id"]]
    return {
        "doc_id": sample["doc_id"],
        "image_id": _writable(entry.image_id(sample)),
        "category": _writable(entry.category(sample)),
        "prompt": _writable(answer.prompt),
        "target": _writable(str(sample["target"])),
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
