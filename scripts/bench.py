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
        sys.exit("\n".join(["The benchmark is not complete:", *missing]))


def report(settings: dict[str, Any]) -> list[str]:
    """Write tables and figures of raw samples that were measured before; nothing is missing."""
    import pandas as pd

    from secateur.efficiency.bench_report import write

    path = Path(settings["report"])
    write(pd.read_parquet(path), path.with_suffix(""), Path(settings["results"]) / "figures")
    return []


def measure(settings: dict[str, Any]) -> list[str]:
    """Measure the models one after the other; write results after each. Returns what is missing."""
    import pandas as pd
    import torch
    from rich.progress import Progress

    from secateur.budget import Budget
    from secateur.efficiency.bench import Bench
    from secateur.efficiency.bench_report import write
    from secateur.efficiency.hardware import check_alone, describe, find_device
    from secateur.geometry import config_of, reduced
    from secateur.grid import add_methods

    add_methods(settings["plugins"])
    device = find_device(settings["device"])
    deadline = time.monotonic() + 60 * settings["minutes"]
    if not settings["shared"]:
        check_alone(device)
    plan, models = _plan(settings, device), settings["models"]
    where = "cpu" if device.type == "cpu" else re.sub("[^a-z0-9]+", "-", describe(device).lower())
    results = Path(settings["results"])
    frames: list[pd.DataFrame] = []
    left_out: dict[str, str] = {}
    missing: list[str] = []
    for model in models:
        if time.monotonic() > deadline:
            missing.append(
                f"{model['name']}: not begun, the {settings['minutes']} minutes were over"
            )
            continue
        layout, pruners = _composed(model["name"], settings)
        config = config_of(model["name"])
        if settings["layers"]:
            config = reduced(config, settings["layers"], settings["shrink"])
        bench = Bench(model["name"], config, plan, layout, model.get("image_side"))
        work = bench.settings(pruners, [Budget.parse(budget) for budget in model["budgets"]])
        with Progress(transient=True) as bar:
            task = bar.add_task(model["name"], total=len(work) * (1 + plan.warm_up + plan.timed))
            samples, without, failed = bench.run(
                work, deadline, functools.partial(bar.advance, task)
            )
        left_out |= without
        missing += [f"{name} failed: {why}" for name, why in failed.items()]
        if (rounds := 0 if samples.empty else samples["round"].nunique()) < plan.timed:
            missing.append(
                f"{model['name']}: {rounds} of {plan.timed} rounds, "
                f"the {settings['minutes']} minutes were over"
            )
        if rounds > 1:
            frames.append(samples)
            together = pd.concat(frames, ignore_index=True)
            together.attrs["left_out"] = left_out
            write(together, results / "bench" / f"bench-{where}", results / "figures")
        del bench
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return missing


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
