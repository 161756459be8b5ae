"""What cannot work is told before a sweep runs anything, once, with the jobs it concerns."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from secateur import hub
from secateur.checkpoints import locate
from secateur.job import Job
from secateur.pruners import InLLMPruner, Pruner, build


def problems(configs: Iterable[DictConfig]) -> list[str]:
    """Why jobs cannot run: wrong settings, a budget that a method cannot hold, the hub.

    Returns:
        One message per cause, with the number of jobs that it concerns.
    """
    found: dict[str, list[str]] = {}
    total = 0
    for config in configs:
        total += 1
        try:
            # hydra's own part has values that a job gets when it starts
            own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
            job = Job.of(own)
            check_schedule(job)
            check_hub(job)
        except (ValueError, OSError) as error:
            name = f"{config.pruner.name} at budget {config.budget}"
            found.setdefault(str(error), []).append(name)
    return [
        f"{message} ({len(names)} of {total} jobs: {', '.join(dict.fromkeys(names))})"
        for message, names in found.items()
    ]


def captures(configs: Iterable[DictConfig]) -> frozenset[str]:
    """What the methods of jobs need of the image encoder, as far as families provide it."""
    fields: list[Any] = [OmegaConf.to_container(one.pruner, resolve=True) for one in configs]
    pruners = [build(**own) for own in fields]
    return frozenset[str]().union(*(one.needs for one in pruners if isinstance(one, Pruner)))


def check_hub(job: Job) -> None:
    """Ask the hub for the commits of what a job loads from there, before anything is downloaded.

    Raises:
        ValueError: it has no such repository, gives no access or does not answer.
    """
    model = job.model
    asked: list[tuple[str, str, hub.Kind, str]] = []
    if model.weights != "random":
        asked.append((model.pretrained, model.revision, "model", "model.pretrained"))
    if model.clip and job.pruner.needs & {"clip_patches", "clip_text"}:
        asked.append((model.clip, "main", "model", "model.clip"))
    if job.suite.data_root is None:
        names = [job.suite.find(task).dataset for task in job.tasks]
        # "json" and the like are readers of `datasets`
        asked += [(n, job.suite.revision, "dataset", "suite.data_root") for n in names if "/" in n]
    wrong = [
        hub.problem(name, revision, kind, option)
        for name, revision, kind, option in dict.fromkeys(asked)
        if not isinstance(locate(name), Path)
    ]
    if messages := [message for message in wrong if message]:
        raise ValueError(" ".join(messages))


def check_schedule(job: Job) -> None:
    """Ask a method inside the LLM for its schedule, where the model's sizes are known here.

    Raises:
        ValueError: the method cannot hold the budget; the message names one that it can hold.
    """
    if not isinstance(job.pruner, InLLMPruner) or (config := _config(job)) is None:
        return
    from secateur.families import family_of

    layers = config.get_text_config().num_hidden_layers
    tokens = family_of(config.model_type).visual_tokens(config)
    if tokens is None:  # it depends on the image; a share does not
        if job.budget.tokens is not None:
            return
        tokens = 1000
    if job.budget.tokens is not None and job.budget.tokens > tokens:
        return  # the document says so, as for every other method
    pruner, keep = job.pruner, job.budget.resolve(tokens)
    try:
        pruner.schedule(tokens, layers, keep)
    except ValueError as error:
        larger = (k for k in range(keep + 1, tokens + 1) if _holds(pruner, tokens, layers, k))
        if (least := next(larger, None)) is None:
            raise
        raise ValueError(
            f"{error}. The smallest larger budget that it can hold in this model is "
            f"{100 * least / tokens:.1f}% ({least} of {tokens} tokens)"
        ) from error


def _holds(pruner: InLLMPruner, tokens: int, layers: int, keep: int) -> bool:
    try:
        pruner.schedule(tokens, layers, keep)
    except ValueError:
        return False
    return True


def _config(job: Job) -> Any:
    """The configuration of a job's checkpoint, if it is a folder here, or of a known one."""
    from transformers import AutoConfig

    from secateur.geometry import config_of

    if isinstance(folder := locate(job.model.pretrained), Path):
        return AutoConfig.from_pretrained(folder) if (folder / "config.json").is_file() else None
    try:
        return config_of(job.model.name)
    except ValueError:
        return None
