"""What the embedded model is trained on: scenes with their truth, and questions as token ids."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaProcessor

from scripts.training.model import PATCH, SIDE
from secateur.shapes.datasets import TRAIN
from secateur.shapes.questions import DOCUMENTS, Doc
from secateur.shapes.scenes import KINDS, MOST, SIZE, Scene, coverage, make_scene, render

if TYPE_CHECKING:  # slow to import
    from lmms_eval.api.task import Task

# A visit to a scene asks one document of each data set; of POPE and MME two.
ASKED = ("pope", "mme", "gqa", "vqav2", "scienceqa_img", "mmmu_val", "mmstar", "mmbench_en")


@dataclass
class Scenes:
    """Training scenes and what is true of them."""

    scenes: list[Scene]
    pixels: Tensor  # [S, height, width, 3] uint8
    owners: Tensor  # [S, patches] number of the thing that a patch shows, -1 for ground
    kinds: Tensor  # [S, MOST] 1 + number of each thing's kind; 0 where there is no thing
    centres: Tensor  # [S, MOST, 2] x and y of each thing, from -1 to 1

    def labels(self, rows: Tensor) -> Tensor:
        """[B, patches] 0 for ground, else 1 + kind."""
        ground = torch.zeros(len(rows), 1, dtype=torch.long)
        return torch.cat([ground, self.kinds[rows]], 1).gather(1, self.owners[rows] + 1)


def _drawn(seed: tuple[int, ...]) -> tuple[Scene, np.ndarray, np.ndarray]:
    """A scene, its pixels, and its owners: things that cover at least a quarter of the patch."""
    scene = make_scene(*seed)
    shares = np.stack(
        [
            coverage(thing).reshape(SIDE, PATCH, SIDE, PATCH).mean(axis=(1, 3))
            for thing in scene.things
        ]
    )
    owners = np.where(shares.max(0) >= 0.25, shares.argmax(0), -1).ravel()
    return scene, np.asarray(render(scene)), owners


def draw(count: int, seed: int) -> Scenes:
    """Draw scenes of the training split."""
    with ProcessPoolExecutor() as pool:
        seeds = [(TRAIN, seed, i) for i in range(count)]
        scenes, pixels, owners = zip(*pool.map(_drawn, seeds, chunksize=50), strict=True)
    kinds, centres = torch.zeros(count, MOST, dtype=torch.long), torch.zeros(count, MOST, 2)
    for row, scene in enumerate(scenes):
        for column, thing in enumerate(scene.things):
            kinds[row, column] = 1 + KINDS.index((thing.color, thing.shape))
            centres[row, column] = torch.tensor([thing.x, thing.y]) / SIZE * 2 - 1
    owner = torch.from_numpy(np.stack(owners))
    return Scenes(list(scenes), torch.from_numpy(np.stack(pixels)), owner, kinds, centres)


# ids before the image, ids between image and answer, ids of answer and end token
Turn = tuple[list[int], list[int], list[int]]


class Conversation:
    """Turns documents into token ids, with the tasks' messages and the processor's template."""

    def __init__(self, tasks: "dict[str, Task]", processor: LlavaProcessor) -> None:
        self.tasks, self.processor = tasks, processor
        self._blank = Image.new("RGB", (1, 1))

    def prompt(self, task: str, doc: Doc) -> str:
        doc = doc | {"image": self._blank, "image_1": self._blank}
        messages = self.tasks[task].doc_to_messages(doc)
        return self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )

    @staticmethod
    def answer(task: str, doc: Doc) -> str:
        if task == "vqav2":
            return " " + doc["multiple_choice_answer"]
        return " " + ("ABCDE"[doc["answer"]] if task == "scienceqa_img" else doc["answer"])

    def ids(self, task: str, doc: Doc) -> Turn:
        tokenizer = self.processor.tokenizer
        prompt = tokenizer(self.prompt(task, doc))["input_ids"]
        at = prompt.index(tokenizer.convert_tokens_to_ids("<image>"))
        answer = tokenizer(self.answer(task, doc), add_special_tokens=False)["input_ids"]
        return prompt[:at], prompt[at + 1 :], [*answer, tokenizer.eos_token_id]


def turns_of(scene: Scene, rng: np.random.Generator) -> list[tuple[str, Doc]]:
    """Questions about a scene, as (task, document)."""
    turns = []
    for task in ASKED:
        docs = DOCUMENTS[task](scene, rng, int(rng.integers(10_000)))
        if task == "mmbench_en" and docs:  # one rotation of the options
            docs = [docs[int(rng.integers(len(docs)))]]
        turns += [(task, doc) for doc in docs]
    return turns


def normal(pixels: Tensor) -> Tensor:
    """uint8 [B,S,S,3] -> what the processor makes of it, [B,3,S,S]."""
    return (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
