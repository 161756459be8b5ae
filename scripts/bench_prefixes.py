"""What sharing the prefix of an image's questions gains, and whether it changes answers.

    python scripts/bench_prefixes.py                  some minutes on two cores
    python scripts/bench_prefixes.py --images 4
    python scripts/bench_prefixes.py --device cuda    LLaVA-1.5-7B's geometry, random weights

Both sides are the harness's own model class in one process, with the same model, prompts and
batches; one of them never shares. They take turns cell by cell. Every answer is compared with that
of the prompt alone (`strict=true`), in float32 and in bfloat16, and the latter with the former.
Writes CSV and Markdown to --out.
"""

import argparse
import gc
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
from transformers import AutoProcessor

from secateur.budget import Budget
from secateur.cache import EncodeCache
from secateur.efficiency.hardware import describe, find_device
from secateur.geometry import config_of, random_model, random_processor, reduced
from secateur.models import PrunedModel
from secateur.paths import ROOT, SHAPES_MODEL
from secateur.pruners import build
from secateur.shapes.questions import DOCUMENTS
from secateur.shapes.scenes import make_scene, render

TURNS = 3  # of which the fastest counts
LAYERS, SHRINK = 6, 8  # of the random LLaVA: 6 blocks of width 512 in image encoder and LLM


SIDES = ("shared", "whole prompts", "alone")


class Sides(PrunedModel):
    """One model that answers as every side does."""

    side, together = "shared", 8192

    def answer(self, side: str, method: str, budget: str, asked: list[Any]) -> list[str]:
        self.side, self.batch_tokens = side, 0 if side == "alone" else self.together
        self.use(build(method), Budget.parse(budget), None)
        self.images.cache.clear()  # every turn encodes its images
        return [result.text for result in self.generate_until(asked)]

    def _may_share(self, method: Any) -> bool:
        return self.side == "shared" and super()._may_share(method)


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
    """A LLaVA-1.5 of true image geometry, 576 visual tokens, with few and narrow layers.

    Its tokenizer is that of the embedded model, a token for most words of the questions, since the
    byte tokenizer of other random models would make them several times as long as they are.
    """
    config = reduced(config_of("llava_1_5_7b"), layers, shrink)
    processor: Any = random_processor(config)
    words = AutoProcessor.from_pretrained(SHAPES_MODEL)
    processor.tokenizer, processor.chat_template = words.tokenizer, words.chat_template
    config.image_token_id = words.image_token_id
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config.text_config, name, getattr(words.tokenizer, name))
    config.text_config.vocab_size = len(words.tokenizer)
    random_model(config, "cpu", torch.float32, "sdpa", seed=0, std=0.1).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=8, help="images per cell (default 8)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench")
    options = parser.parse_args()
    find_device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        rows: list[dict[str, Any]] = []
        exact: dict[tuple[Any, ...], list[str]] = {}
        for dtype in ("float32", "bfloat16"):
            for name, fields, cells in models(Path(folder), options.device):
                model = Sides(**fields, dtype=dtype, cache=EncodeCache(2**30))
                model.together = 8192 if options.device == "cpu" else 65536
                for cell in track(cells, description=f"{name}, {dtype}"):
                    row, alone = measure(model, *cell, options.images)
                    before = exact.setdefault((name, *cell), alone)
                    off = sum(a != b for a, b in zip(alone, before, strict=True))
                    rows.append({"model": name, "dtype": dtype} | row | {"from float32": off})
                del model
                gc.collect()
    _write(pd.DataFrame(rows), options)


Cell = tuple[str, int, str, str]  # task, questions per image, method, budget


def models(folder: Path, device: str) -> list[tuple[str, dict[str, Any], list[Cell]]]:
    """What runs on a device: title, fields of `PrunedModel`, cells."""
    wide: list[Cell] = [("pope", 18, "none", "full"), ("pope", 18, "scope", "64")]
    if device == "cuda":
        fields = {"pretrained": "-", "name": "llava_1_5_7b", "weights": "random", "device": device}
        return [("LLaVA-1.5-7B, random weights", fields, wide)]
    narrow: list[Cell] = [
        (task, questions, method, budget)
        for task, questions in (("pope", 18), ("gqa", 32))
        for method, budget in (("none", "full"), ("scope", "16"))
    ]
    random = {"pretrained": random_checkpoint(folder), "device": device}
    return [
        ("embedded LLaVA", {"pretrained": str(SHAPES_MODEL), "device": device}, narrow),
        (f"random LLaVA, {LAYERS} layers of 512", random, wide),
    ]


def measure(
    model: Sides, task: str, questions: int, method: str, budget: str, images: int
) -> tuple[dict[str, Any], list[str]]:
    """One cell on both sides, and the answers of every prompt alone."""
    asked = requests(model, task, images, questions)
    seconds, answers = dict.fromkeys(SIDES, float("inf")), {}
    for turn in range(1 + TURNS):  # the first prepares the documents and warms up
        for side in SIDES if not turn else SIDES[:2]:
            started = time.perf_counter()
            answers[side] = model.answer(side, method, budget, asked)
            if turn:
                seconds[side] = min(seconds[side], time.perf_counter() - started)
    changed = {
        side: sum(a != b for a, b in zip(own, answers["alone"], strict=True))
        for side, own in answers.items()
    }
    row = {
        "questions per image": questions,
        "method": f"{method} at {budget}",
        "documents": len(asked),
        "shared, s": seconds["shared"],
        "whole prompts, s": seconds["whole prompts"],
        "speed-up": seconds["whole prompts"] / seconds["shared"],
        "changed, shared": changed["shared"],
        "changed, whole prompts": changed["whole prompts"],
    }
    return row, answers["alone"]


def _write(rows: pd.DataFrame, options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    load = f", load {os.getloadavg()[0]:.1f} at the end" * (options.device == "cpu")
    exact = rows[rows["dtype"] == "float32"]
    flips, answers = int(exact["changed, shared"].sum()), int(exact["documents"].sum())
    text = f"""# Sharing the prefix of an image's questions

{describe(device)}{load}, torch {torch.__version__}. {options.images} images per cell, at most 2 new
tokens. Both sides are the harness in one process, and take turns; the fastest of {TURNS} turns
counts, with documents prepared and images not encoded. `whole prompts`: the same engine, batches of
whole prompts. `changed`: answers that differ from those of every prompt alone (strict=true); `from
float32`: answers of every prompt alone that differ from those in float32. In float32 sharing
changed {flips} of {answers} answers. Generated by `scripts/bench_prefixes.py`.

{rows.round(2).to_markdown(index=False)}
"""
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"prefixes-{options.device}.md").write_text(text)
    rows.to_csv(options.out / f"prefixes-{options.device}.csv", index=False)
    print(text)


if __name__ == "__main__":
    main()
