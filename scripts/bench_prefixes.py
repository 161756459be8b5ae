"""What sharing the prefix of an image's questions gains, and whether it changes answers.

    python scripts/bench_prefixes.py            some minutes on two cores
    python scripts/bench_prefixes.py --images 4

Both sides are the harness's own model class in one process, with the same prompts and batches; one
of them never shares. They take turns cell by cell. Every answer is compared with that of the prompt
alone (`strict=true`), in float32 and in bfloat16. Writes CSV and Markdown to --out.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from rich.progress import track

from secateur.budget import Budget
from secateur.cache import EncodeCache
from secateur.efficiency.hardware import describe
from secateur.geometry import config_of, random_model, random_processor, reduced
from secateur.models import PrunedModel
from secateur.paths import ROOT, SHAPES_MODEL
from secateur.pruners import build
from secateur.shapes.questions import DOCUMENTS
from secateur.shapes.scenes import make_scene, render

TURNS = 3  # of which the fastest counts
LAYERS, SHRINK = 6, 8  # of the random LLaVA: 6 blocks of width 512 in image encoder and LLM


class Unshared(PrunedModel):
    """The same engine without shared prefixes: batches of whole prompts."""

    def _may_share(self, method: Any) -> bool:
        return False


def requests(model: PrunedModel, task: str, images: int, questions: int) -> list[Any]:
    """Questions of the embedded suite, so many about each image; the images come in turn."""
    scenes, rows = [make_scene(9, number) for number in range(images)], []
    for key in range(questions):
        for number, scene in enumerate(scenes):
            docs = DOCUMENTS[task](scene, np.random.default_rng([key, number]), key)
            text = docs[key % len(docs)]["question"] if docs else f"Is there a thing {key}?"
            rows.append({"image_source": str(number), "question": text})
    model.task_dict["pope"] = {"test": Dataset.from_list(rows)}
    pictures = [render(scene) for scene in scenes]

    def messages(doc: dict[str, str]) -> list[dict[str, Any]]:
        image = {"type": "image", "url": pictures[int(doc["image_source"])]}
        text = {"type": "text", "text": doc["question"]}
        return [{"role": "user", "content": [image, text]}]

    return [
        SimpleNamespace(args=("", messages, {"max_new_tokens": 2}, number, "pope", "test"))
        for number in range(len(rows))
    ]


def random_checkpoint(folder: Path, layers: int = LAYERS, shrink: int = SHRINK) -> str:
    """A LLaVA-1.5 of true image geometry, 576 visual tokens, with few and narrow layers."""
    config = reduced(config_of("llava_1_5_7b"), layers, shrink)
    random_model(config, "cpu", torch.float32, "sdpa", seed=0, std=0.1).save_pretrained(folder)
    random_processor(config).save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=8, help="images per cell (default 8)")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wide = random_checkpoint(Path(folder))
        cells = [
            *(
                ("embedded LLaVA", str(SHAPES_MODEL), *cell)
                for cell in (
                    ("pope", 18, "none", "full"),
                    ("pope", 18, "scope", "16"),
                    ("gqa", 32, "none", "full"),
                    ("gqa", 32, "scope", "16"),
                )
            ),
            *(
                (f"random LLaVA, {LAYERS} layers of 512", wide, "pope", 18, *cell)
                for cell in (("none", "full"), ("scope", "64"))
            ),
        ]
        rows = [
            measure(*cell, dtype, options.images)
            for dtype in ("float32", "bfloat16")
            for cell in track(cells, description=dtype)
        ]
    _write(pd.DataFrame(rows), options)


def measure(
    model: str,
    weights: str,
    task: str,
    questions: int,
    method: str,
    budget: str,
    dtype: str,
    images: int,
) -> dict[str, Any]:
    """One cell on both sides, and the answers of every prompt alone."""
    fields: dict[str, Any] = {"dtype": dtype, "device": "cpu"}
    sides = {
        "shared": PrunedModel(weights, **fields, batch_tokens=8192, cache=EncodeCache(2**30)),
        "whole prompts": Unshared(weights, **fields, batch_tokens=8192, cache=EncodeCache(2**30)),
        "alone": PrunedModel(weights, **fields, cache=EncodeCache(2**30)),
    }
    asked = {side: requests(loaded, task, images, questions) for side, loaded in sides.items()}
    seconds, answers = dict.fromkeys(sides, float("inf")), {}
    for turn in range(1 + TURNS):  # the first prepares the documents and warms up
        for side, loaded in sides.items():
            if side == "alone" and turn:
                continue
            loaded.use(build(method), Budget.parse(budget), None)
            loaded.images.cache.clear()  # every turn encodes its images
            started = time.perf_counter()
            answers[side] = [result.text for result in loaded.generate_until(asked[side])]
            if turn:
                seconds[side] = min(seconds[side], time.perf_counter() - started)
    count = len(answers["alone"])
    changed = {
        side: sum(a != b for a, b in zip(own, answers["alone"], strict=True))
        for side, own in answers.items()
    }
    return {
        "model": model,
        "questions per image": questions,
        "method": f"{method} at {budget}",
        "dtype": dtype,
        "documents": count,
        "shared, s": seconds["shared"],
        "whole prompts, s": seconds["whole prompts"],
        "speed-up": seconds["whole prompts"] / seconds["shared"],
        "changed, shared": changed["shared"],
        "changed, whole prompts": changed["whole prompts"],
    }


def _write(rows: pd.DataFrame, options: argparse.Namespace) -> None:
    machine = f"{describe(torch.device('cpu'))}, load {os.getloadavg()[0]:.1f} at the end"
    exact = rows[rows["dtype"] == "float32"]
    flips, answers = int(exact["changed, shared"].sum()), int(exact["documents"].sum())
    text = f"""# Sharing the prefix of an image's questions

{machine}, torch {torch.__version__}. {options.images} images per cell, at most 2 new tokens,
batch_tokens 8192. Both sides are the harness in one process, and take turns; the fastest of
{TURNS} turns counts, with documents prepared and images not encoded. `whole prompts`: the same
engine, batches of whole prompts. `changed`: answers that differ from those of every prompt alone
(strict=true). In float32 sharing changed {flips} of {answers} answers. Generated by
`scripts/bench_prefixes.py`.

{rows.round(2).to_markdown(index=False)}
"""
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "prefixes-cpu.md").write_text(text)
    rows.to_csv(options.out / "prefixes-cpu.csv", index=False)
    print(text)


if __name__ == "__main__":
    main()
