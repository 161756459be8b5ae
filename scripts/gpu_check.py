"""Check on a GPU, at true size and in half precision, what the tests check on a CPU.

    python scripts/gpu_check.py                        7B, bfloat16, every kernel that is installed
    python scripts/gpu_check.py --device cpu --dtype float32 --tiny        anywhere, in seconds

The weights are random. `all`: every token is kept, before the language model (none) or inside it
(fastv); compared with the model without hooks. `subset`: evenly spaced tokens are kept; compared
with the language model that receives these alone. Errors are over all logits of the prompt. `moved`
is by how much the subset changes the logits after the image; an error must be well below it. Writes
a table to --out.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers.utils import is_flash_attn_2_available

from secateur.efficiency.bench import Bench, Plan
from secateur.efficiency.hardware import describe, find_device
from secateur.geometry import config_of, tiny
from secateur.injection import inject
from secateur.pruners import build

SIDES = {  # image_side of secateur.inputs
    "llava_1_5_7b": None,
    "llava_1_5_13b": None,
    "qwen2_vl_7b": 1008,
    "qwen2_5_vl_7b": 1008,
    "qwen2_5_vl_3b": 1008,
    "qwen3_vl_8b": 1024,
    "qwen3_vl_4b": 1024,
    "qwen3_vl_2b": 1024,
    "internvl3_8b": None,
    "internvl3_2b": None,
    "internvl3_1b": None,
}
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}  # share of the largest logit


@torch.no_grad()
def checks(bench: Bench, keep: int) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """Compare logits [L, V] of the pruned model with those it must have.

    Returns:
        name of the check -> (logits, expected logits); and the largest change that the subset makes
        in the logits after the image.
    """
    model, (inputs, _) = bench.model, bench.prompts[0]
    seen: dict[str, Any] = {}
    handle = bench.adapter.language_model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.update(kwargs), with_kwargs=True
    )
    plain = model(**inputs).logits[0]
    handle.remove()
    found = {}
    for method, options in (("none", {}), ("fastv", {"layer": 1})):
        with inject(model, build(method, **options), "full"):
            found[f"all, {method}"] = model(**inputs).logits[0], plain

    with inject(model, build("uniform"), keep) as trace:
        pruned = model(**inputs).logits[0]
    visual = inputs["input_ids"][0] == bench.adapter.image_token_id
    stays = ~visual
    stays[visual.nonzero()[:, 0][list(trace.audits[0].kept_indices[0])]] = True
    compact = bench.adapter.POSITIONS[0] == "compact"
    positions = (
        torch.arange(int(stays.sum()), device=stays.device)[None]
        if compact
        else seen["position_ids"][..., stays]
    )
    arguments = bench.adapter.pruned_arguments(seen, stays.nonzero()[:, 0][None]) | {
        "inputs_embeds": seen["inputs_embeds"][:, stays],
        "position_ids": positions,
        "attention_mask": None,
        "use_cache": False,
    }
    hidden = bench.adapter.language_model(**arguments)
    expected = model.lm_head(hidden.last_hidden_state)[0]
    found[f"subset, {keep} of {bench.tokens}"] = pruned, expected
    after = bench.plan.text[1]
    return found, float((expected[-after:] - plain[-after:]).float().abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=list(TOLERANCE))
    parser.add_argument(
        "--models",
        default="llava_1_5_7b,qwen2_5_vl_7b",
        help=f"comma-separated; known: {', '.join(SIDES)}",
    )
    parser.add_argument("--tiny", action="store_true", help="four layers of width 64")
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    options = parser.parse_args()
    names = options.models.split(",")
    if unknown := set(names) - set(SIDES):
        parser.error(f"no check for {', '.join(unknown)}; known: {', '.join(SIDES)}")
    try:
        device = find_device(options.device)
    except ValueError as error:
        parser.error(str(error))

    kernels = [
        "sdpa",
        *["flash_attention_2"] * (device.type == "cuda" and is_flash_attn_2_available()),
    ]
    rows = []
    for name in names:
        config, side = config_of(name), SIDES[name]
        if options.tiny:
            config, side = tiny(config.model_type), side and 168
        for kernel in kernels:
            plan = Plan(
                device,
                options.dtype,
                kernel,
                "",
                prompts=1,
                text=(35, 27),
                new_tokens=1,
                warm_up=1,
                timed=2,
                seed=0,
            )
            bench = Bench(name, config, plan, image_side=side)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            found, moved = checks(bench, bench.tokens // 4)
            for check, (half, half_expected) in found.items():
                pruned, expected = half.float(), half_expected.float()
                off, largest = float((pruned - expected).abs().max()), float(expected.abs().max())
                rows.append(
                    {
                        "model": name,
                        "kernel": kernel,
                        "check": check,
                        "max error": off,
                        "largest logit": largest,
                        "moved": moved,
                        "same argmax %": 100
                        * float((pruned.argmax(-1) == expected.argmax(-1)).float().mean()),
                        "peak GB": torch.cuda.max_memory_allocated(device) / 1e9
                        if device.type == "cuda"
                        else float("nan"),
                        "passed": off
                        <= min(TOLERANCE[options.dtype] * largest, moved / 2),  # false for NaN
                    }
                )
            del bench
    table = pd.DataFrame(rows)
    geometry = "tiny" if options.tiny else "true"
    text = f"""# Pruned models compared with what they must compute

{describe(device)}, {options.dtype}, {geometry} geometry, random weights, torch {torch.__version__}.
Generated by `scripts/gpu_check.py`.

{table.to_markdown(index=False, floatfmt=".4g")}
"""
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"check-{device.type}-{options.dtype}.md").write_text(text, encoding="utf-8")
    if not table["passed"].all():
        sys.exit("a pruned model is further from what it must compute than rounding explains")


if __name__ == "__main__":
    main()
