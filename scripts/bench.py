"""Time every method phase by phase, beside the unpruned model and the ceiling of each budget.

python scripts/bench.py                            on a GPU (`make bench-gpu`)
python scripts/bench.py --config-name bench_cpu    on a CPU (`make bench`)
"""

import functools
import gc
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf


@hydra.main(config_path="../configs", config_name="bench", version_base="1.3")
def main(config: DictConfig) -> None:
    from secateur.efficiency.hardware import SharedGPU
    from secateur.efficiency.latency import ClockJumped

    settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    try:
        missing = report(settings) if settings["report"] else measure(settings)
    except (ValueError, OSError, SharedGPU, ClockJumped) as error:  # their messages name the fix
        sys.exit(str(error))
    if missing:
        kept = "What was measured has names that end in -incomplete; an earlier result stays."
        sys.exit("\n".join(["The benchmark is not complete:", *missing, kept]))


def report(settings: dict[str, Any]) -> list[str]:
    """Write tables and figures of raw samples that were measured before; nothing is missing."""
    import pandas as pd

    from secateur.efficiency.bench_report import write

    path = Path(settings["report"])
    served = path.with_name(f"{path.stem}-serving.parquet")
    found = pd.read_parquet(served) if served.exists() else pd.DataFrame()
    write(pd.read_parquet(path), found, path.with_suffix(""), Path(settings["results"]) / "figures")
    return []


def measure(settings: dict[str, Any]) -> list[str]:
    """Measure the models one after the other. Returns what is missing.

    Results are written after each model under names that end in "incomplete". A run that misses
    nothing gives them their own names, so that it alone replaces an earlier one.
    """
    import pandas as pd
    from rich.console import Console

    from secateur.efficiency.bench_report import remove, show, write
    from secateur.efficiency.hardware import check_alone, describe, find_device
    from secateur.efficiency.serving import Load
    from secateur.grid import add_methods

    add_methods(settings["plugins"])
    device, console = find_device(settings["device"]), Console(width=None)
    deadline = time.monotonic() + 60 * settings["minutes"]
    if not settings["shared"]:
        check_alone(device)
    plan = _plan(settings, device)
    load = Load(**settings["serving"] | {"batches": tuple(settings["serving"]["batches"])})
    where = "cpu" if device.type == "cpu" else re.sub("[^a-z0-9]+", "-", describe(device).lower())
    results = Path(settings["results"])
    stem, figures = results / "bench" / f"bench-{where}", results / "figures"
    unfinished = stem.with_name(f"{stem.name}-incomplete")
    phases: list[pd.DataFrame] = []
    served: list[pd.DataFrame] = []
    left_out: dict[str, str] = {}
    missing: list[str] = []
    for model in settings["models"]:
        if time.monotonic() > deadline:
            missing.append(
                f"{model['name']}: not begun, the {settings['minutes']} minutes were over"
            )
            continue
        samples, batches, without, why = _measure_model(settings, model, plan, load, deadline)
        left_out |= without
        missing += why
        served += [batches] * (not batches.empty)
        if samples.empty or samples["round"].nunique() < 2:
            continue
        phases.append(samples)
        show(samples, console)
        together = pd.concat(phases, ignore_index=True)
        together.attrs["left_out"] = left_out
        write(together, pd.concat([pd.DataFrame(), *served]), unfinished, figures)
    if phases and not missing:
        write(together, pd.concat([pd.DataFrame(), *served]), stem, figures)
        remove(unfinished, figures)
    return missing


def _measure_model(
    settings: dict[str, Any], model: dict[str, Any], plan: Any, load: Any, deadline: float
) -> tuple[Any, Any, dict[str, str], list[str]]:
    """Measure one model: its phases, its batches, what was left out, and what is missing."""
    import torch
    from rich.progress import Progress

    from secateur.budget import Budget
    from secateur.efficiency.bench import Bench
    from secateur.efficiency.serving import serve
    from secateur.geometry import config_of, reduced

    name = model["name"]
    layout, pruners = _composed(name, settings)
    config = config_of(name)
    if settings["layers"]:
        config = reduced(config, settings["layers"], settings["shrink"])
    bench = Bench(name, config, plan, layout, model.get("image_side"))
    work = bench.settings(pruners, [Budget.parse(budget) for budget in model["budgets"]])
    requests = [setting for setting in work if setting.kind != "ceiling"]
    with Progress() as bar:
        task = bar.add_task(name, total=len(work) * (1 + plan.warm_up + plan.timed))
        samples, left_out, failed = bench.run(work, deadline, functools.partial(bar.advance, task))
        rounds = 1 + load.warm_up + load.timed
        total = len(requests) * len(load.batches) * rounds
        task = bar.add_task(f"{name}, batches of {', '.join(map(str, load.batches))}", total=total)
        batches, without = serve(
            bench, requests, load, deadline, functools.partial(bar.advance, task)
        )
    missing = [f"{setting} failed: {why}" for setting, why in failed.items()]
    for what, found, asked in (("", samples, plan.timed), (" in batches", batches, load.timed)):
        done = 0 if found.empty else found["round"].nunique()
        if done < asked:
            missing.append(
                f"{name}{what}: {done} of {asked} rounds, the {settings['minutes']} minutes were "
                "over"
            )
    del bench
    gc.collect()
    if plan.device.type == "cuda":
        torch.cuda.empty_cache()
    return samples, batches, left_out | without, missing


def _plan(settings: dict[str, Any], device: Any) -> Any:
    from secateur.efficiency.bench import Plan

    fields = ("dtype", "attn_implementation", "prompts", "new_tokens", "warm_up", "timed", "seed")
    layers = settings["layers"]
    return Plan(
        device=device,
        geometry=f"{layers} layers, widths / {settings['shrink']}" if layers else "true",
        text=tuple(settings["text_tokens"]),
        **{name: settings[name] for name in fields},
    )


def _composed(model: str, settings: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The model's layout and a pruner for each method, from the configs that a sweep uses."""
    from secateur.pruners import build

    fields = [
        f"++model.pruner_fields.{name}.{key}={value}"
        for name, of in settings["pruner_fields"].items()
        for key, value in of.items()
    ]
    layout, pruners = None, []
    for method in settings["methods"]:
        config = hydra.compose("sweep", [f"model={model}", f"pruner={method}", *fields])
        composed: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
        layout = composed["model"]["layout"]
        pruners.append(build(**composed["pruner"]))
    return layout, pruners


if __name__ == "__main__":
    os.environ.setdefault("LOGURU_LEVEL", "WARNING")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
