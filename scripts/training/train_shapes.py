"""Train the embedded model, a LLaVA of about two million parameters, on a CPU.

    python scripts/training/train_shapes.py FOLDER    (`make train-shapes`; an hour on two cores)

Training starts from random weights and uses generated scenes:

1. The tower alone learns which object and place each patch shows, and its CLS token learns which
   objects are in the scene, so that CLS attention means something.
2. The tower is frozen; the projector learns to map patches to the embeddings of words.
3. Projector and Llama learn to answer. One sequence holds a scene and several questions. Each
   question sees the scene and itself only, as at test time. The first steps use the data sets with
   short prompts.
"""

import argparse
import json
import logging
import os
import platform
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

from secateur.prompts import LLAVA
from secateur.shapes.datasets import TRAIN, TRAINED_TASKS, build
from secateur.shapes.questions import DOCUMENTS, TRAINED, Doc
from secateur.shapes.scenes import KINDS, SIZE, Scene, coverage, make_scene, render

if TYPE_CHECKING:  # slow to import
    from lmms_eval.api.task import Task

log = logging.getLogger(__name__)

PATCH = 8  # pixels
SIDE = SIZE // PATCH  # patches along one side of the image
# How often a visit to a scene calls each data set's builder. A call for POPE or MME gives two
# questions, a call for the others one.
SHORT_TURNS = {"pope": 2, "gqa": 5, "mme": 2}
TURNS = {"pope": 1, "gqa": 2, "scienceqa_img": 2, "mme": 1, "mmmu_val": 2, "mmstar": 2}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, apart from library versions and the machine."""

    seed: int = 0
    scenes: int = 12_000
    tower_steps: int = 900
    tower_batch: int = 64
    tower_lr: float = 1e-3
    align_steps: int = 800
    short_steps: int = 350
    steps: int = 1500  # all of stage 3, including short_steps
    batch: int = 32
    lr: float = 2e-3
    # For the Llama's matrices. With AdamW alone, answers stay at chance several times as long.
    muon_lr: float = 0.02
    warmup: int = 30
    vocabulary: int = 2048  # an upper limit: merging ends when every word is one token


# --- the model


def make_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer. Each word of the suite is one token; other text encodes too."""
    specials = ["<s>", "</s>", "<pad>", "<image>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=specials,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_input_names=["input_ids", "attention_mask"],
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    square = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size=square, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA,
        image_token="<image>",
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Any:
    """A LLaVA with random weights.

    At this width the loss stays on a plateau with the default initialisation of transformers, so
    embeddings and projector get larger random weights.
    """
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=128,
    )
    text = LlamaConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        initializer_range=0.08,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.vocab["<image>"],
        image_seq_length=SIDE * SIDE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model: Any = LlavaForConditionalGeneration(config)
    projector = model.model.multi_modal_projector
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(std=0.5)
        for layer in (projector.linear_1, projector.linear_2):
            layer.weight.normal_(std=layer.in_features**-0.5)
            layer.bias.zero_()
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


# --- the data


def _picture(scene: Scene) -> np.ndarray:
    return np.asarray(render(scene))


def _labels(scene: Scene) -> np.ndarray:
    """[patches] 0 for ground, 1 + kind where one thing covers at least a quarter of the patch."""
    shares = np.stack(
        [
            coverage(thing).reshape(SIDE, PATCH, SIDE, PATCH).mean(axis=(1, 3))
            for thing in scene.things
        ]
    )
    kinds = np.array([1 + KINDS.index((thing.color, thing.shape)) for thing in scene.things])
    return np.where(shares.max(0) >= 0.25, kinds[shares.argmax(0)], 0).ravel()


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
        return " " + ("ABCDE"[doc["answer"]] if task == "scienceqa_img" else doc["answer"])

    def ids(self, task: str, doc: Doc) -> tuple[list[int], list[int], list[int]]:
        """Three lists of ids: before the image, between image and answer, answer and end token."""
        tokenizer = self.processor.tokenizer
        prompt = tokenizer(self.prompt(task, doc))["input_ids"]
        at = prompt.index(tokenizer.convert_tokens_to_ids("<image>"))
        answer = tokenizer(self.answer(task, doc), add_special_tokens=False)["input_ids"]
        return prompt[:at], prompt[at + 1 :], [*answer, tokenizer.eos_token_id]


def _turns(
    scene: Scene, rng: np.random.Generator, calls_of: dict[str, int] = TURNS
) -> list[tuple[str, Doc]]:
    docs = []
    for task, calls in calls_of.items():
        for _ in range(calls):
            docs += [
                (task, doc)
                for doc in DOCUMENTS[task](scene, rng, int(rng.integers(10_000)), TRAINED)
            ]
    return docs


# --- stage 1: the tower


def train_tower(model: Any, pixels: Tensor, scenes: list[Scene], recipe: Recipe) -> None:
    tower = model.model.vision_tower
    width = model.config.vision_config.hidden_size
    patch_head, cls_head, place_head = (
        nn.Linear(width, 1 + len(KINDS)),
        nn.Linear(width, len(KINDS)),
        nn.Linear(width, 2 * SIDE),
    )
    labels = torch.from_numpy(np.stack([_labels(scene) for scene in scenes]))
    present = F.one_hot(labels, 1 + len(KINDS)).amax(1)[:, 1:].float()
    rows, columns = (torch.arange(SIDE * SIDE) // SIDE), (torch.arange(SIDE * SIDE) % SIDE)
    parameters = [
        p for module in (tower, patch_head, cls_head, place_head) for p in module.parameters()
    ]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.tower_lr, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup, recipe.tower_steps)
    generator = torch.Generator().manual_seed(recipe.seed)
    weight = torch.ones(1 + len(KINDS))
    weight[0] = 0.1  # nine patches in ten are ground
    for step in range(recipe.tower_steps):
        batch = torch.randint(len(pixels), (recipe.tower_batch,), generator=generator)
        hidden = tower(_normal(pixels[batch]), output_hidden_states=True).hidden_states[
            model.config.vision_feature_layer
        ]
        cls, patches = hidden[:, 0], hidden[:, 1:]
        row, column = place_head(patches).split(SIDE, dim=-1)
        patch_loss = F.cross_entropy(
            patch_head(patches).flatten(0, 1), labels[batch].flatten(), weight=weight
        )
        cls_loss = F.binary_cross_entropy_with_logits(cls_head(cls), present[batch])
        place_loss = F.cross_entropy(row.flatten(0, 1), rows.repeat(len(batch)))
        place_loss += F.cross_entropy(column.flatten(0, 1), columns.repeat(len(batch)))
        loss = patch_loss + 4 * cls_loss + 0.25 * place_loss
        _step(loss, parameters, [optimizer], [schedule])
        if step % 50 == 0 or step == recipe.tower_steps - 1:
            log.info(
                "tower %d: patch %.3f cls %.3f place %.3f",
                step,
                patch_loss.item(),
                cls_loss.item(),
                place_loss.item(),
            )


def _normal(pixels: Tensor) -> Tensor:
    """uint8 [B,S,S,3] -> what the processor makes of it, [B,3,S,S]."""
    return (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25


def _step(
    loss: Tensor,
    parameters: list[nn.Parameter],
    optimizers: list[torch.optim.Optimizer],
    schedules: list[Any],
) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    for stepping in (*optimizers, *schedules):
        stepping.step()


@torch.no_grad()
def encode(model: Any, pixels: Tensor) -> Tensor:
    """Encoder features [scenes, N, C], the projector's input."""
    tower, layer = model.model.vision_tower, model.config.vision_feature_layer
    return torch.cat(
        [
            tower(_normal(part), output_hidden_states=True).hidden_states[layer][:, 1:]
            for part in pixels.split(128)
        ]
    )


# --- stage 2: the projector


def align_projector(
    model: Any,
    features: Tensor,
    scenes: list[Scene],
    tokenizer: PreTrainedTokenizerFast,
    recipe: Recipe,
) -> None:
    """Map the patches of an object to the sum of its words' embeddings.

    Every patch, ground included, also gets a code of its place.
    """
    projector, embed = (
        model.model.multi_modal_projector,
        model.get_input_embeddings().weight.detach(),
    )
    generator = torch.Generator().manual_seed(recipe.seed + 1)

    def word(text: str) -> Tensor:
        return embed[tokenizer(" " + text, add_special_tokens=False)["input_ids"]].sum(0)

    kinds = torch.stack(
        [torch.zeros_like(embed[0]), *(word(color) + word(shape) for color, shape in KINDS)]
    )
    codes = torch.randn(2, SIDE, embed.shape[1], generator=generator) * 0.35
    places = (codes[0][:, None] + codes[1][None, :]).flatten(0, 1)
    labels = torch.from_numpy(np.stack([_labels(scene) for scene in scenes]))
    with torch.no_grad():
        projector.linear_1.weight /= features[:256].std()
    optimizer = torch.optim.AdamW(projector.parameters(), lr=recipe.lr)
    schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup, recipe.align_steps)
    for step in range(recipe.align_steps):
        batch = torch.randint(len(features), (64,), generator=generator)
        error = (projector(features[batch]) - kinds[labels[batch]] - places).square().mean(-1)
        here = labels[batch] > 0
        loss = error[here].mean() + error[~here].mean()
        _step(loss, list(projector.parameters()), [optimizer], [schedule])
        if step % 100 == 0 or step == recipe.align_steps - 1:
            log.info(
                "align %d: objects %.3f ground %.3f",
                step,
                error[here].mean().item(),
                error[~here].mean().item(),
            )


# --- stage 3: projector and language model


@dataclass
class Packed:
    """A batch of scenes, each with all its turns (question and answer) in one sequence."""

    before: Tensor  # [P] ids before the image
    ids: Tensor  # [B, T] ids after the image
    positions: Tensor  # [B, P+N+T]
    mask: Tensor  # [B, 1, P+N+T, P+N+T] additive; a turn sees the scene and itself
    targets: Tensor  # [B, T] the next token where an answer is predicted, else -100
    turn: Tensor  # [B, T] number of the turn, -1 for padding


def pack(items: list[list[tuple[list[int], list[int], list[int]]]], visual: int) -> Packed:
    """Pack the turns of each scene, as `Conversation.ids` gives them, after `visual` tokens."""
    before = items[0][0][0]
    start = len(before) + visual
    longest = max(
        sum(len(after) + len(answer) - 1 for _, after, answer in turns) for turns in items
    )
    ids, targets = (
        torch.zeros(len(items), longest, dtype=torch.long),
        torch.full((len(items), longest), -100),
    )
    turn, position = (
        torch.full((len(items), longest), -1),
        torch.zeros(len(items), longest, dtype=torch.long),
    )
    for b, turns in enumerate(items):
        at = 0
        for number, (_, after, answer) in enumerate(turns):
            tokens = torch.tensor(after + answer[:-1])
            end = at + len(tokens)
            ids[b, at:end], turn[b, at:end] = tokens, number
            position[b, at:end] = start + torch.arange(len(tokens))
            targets[b, at + len(after) - 1 : end] = torch.tensor(answer)
            at = end
    length = start + longest
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    owner = torch.cat([torch.full((len(items), start), -2), turn], 1)  # -2: the scene
    seen = causal & ((owner[:, None, :] == owner[:, :, None]) | (owner[:, None, :] == -2))
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]
    positions = torch.cat([torch.arange(start).expand(len(items), -1), position], 1)
    return Packed(torch.tensor(before), ids, positions, mask, targets, turn)


def answer_logits(model: Any, features: Tensor, packed: Packed) -> Tensor:
    """Logits at the answer positions, in the order of `packed.targets[packed.targets >= 0]`."""
    embed = model.get_input_embeddings()
    images = model.model.multi_modal_projector(features)
    before = embed(packed.before).expand(len(features), -1, -1)
    inputs = torch.cat([before, images, embed(packed.ids)], 1)
    hidden = model.model.language_model(
        inputs_embeds=inputs,
        attention_mask=packed.mask,
        position_ids=packed.positions,
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[:, -packed.ids.shape[1] :][packed.targets >= 0])


def train_language(
    model: Any, features: Tensor, scenes: list[Scene], talk: Conversation, recipe: Recipe
) -> None:
    model.model.vision_tower.requires_grad_(False)
    matrices = [p for p in model.model.language_model.layers.parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    optimizers = [
        torch.optim.Muon(matrices, lr=recipe.muon_lr, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=recipe.lr, weight_decay=0.01, betas=(0.9, 0.98)),
    ]
    schedules = [
        get_cosine_schedule_with_warmup(optimizer, recipe.warmup, recipe.steps)
        for optimizer in optimizers
    ]
    rng = np.random.default_rng([recipe.seed, 1])
    held_out = range(len(scenes) - 64, len(scenes))
    losses, started = [], time.time()
    for step in range(recipe.steps):
        batch = rng.integers(0, held_out.start, recipe.batch)
        turns = SHORT_TURNS if step < recipe.short_steps else TURNS
        packed = pack(
            [[talk.ids(*turn) for turn in _turns(scenes[i], rng, turns)] for i in batch],
            features.shape[1],
        )
        loss = F.cross_entropy(
            answer_logits(model, features[batch], packed), packed.targets[packed.targets >= 0]
        )
        _step(loss, matrices + others, optimizers, schedules)
        losses.append(loss.item())
        if step % 50 == 49 or step == recipe.steps - 1:
            log.info(
                "language %d: loss %.3f, %.2f s per step",
                step + 1,
                np.mean(losses[-50:]),
                (time.time() - started) / (step + 1),
            )
        if step % 250 == 249 or step == recipe.steps - 1:
            log.info("right answers: %s", validate(model, features, scenes, talk, held_out))


@torch.no_grad()
def validate(
    model: Any, features: Tensor, scenes: list[Scene], talk: Conversation, held_out: range
) -> dict:
    """Share of turns, per data set, in which every token of the answer has the largest logit."""
    rng = np.random.default_rng(5)
    right = defaultdict(list)
    for chunk in (held_out[i : i + 16] for i in range(0, len(held_out), 16)):
        turns = [_turns(scenes[i], rng) for i in chunk]
        packed = pack([[talk.ids(*turn) for turn in row] for row in turns], features.shape[1])
        where = packed.targets >= 0
        hit = torch.ones_like(where)
        hit[where] = (
            answer_logits(model, features[list(chunk)], packed).argmax(-1) == packed.targets[where]
        )
        for b, row in enumerate(turns):
            for number, (task, _) in enumerate(row):
                right[task].append(bool(hit[b][packed.turn[b] == number].all()))
    return {task: round(float(np.mean(hits)), 3) for task, hits in right.items()}


# --- the whole


def train(recipe: Recipe, tasks: "dict[str, Task]", out: Path) -> None:
    """Train from random weights; save model (float16), processor and recipe.json to `out`."""
    started = time.time()
    torch.manual_seed(recipe.seed)
    scenes = [make_scene(TRAIN, recipe.seed, i) for i in range(recipe.scenes)]
    with ProcessPoolExecutor() as pool:
        pixels = torch.from_numpy(np.stack(list(pool.map(_picture, scenes, chunksize=200))))
    log.info("%d scenes drawn in %.0f s", len(scenes), time.time() - started)

    placeholder = Conversation(tasks, make_processor(make_tokenizer([], 512)))
    rng = np.random.default_rng([recipe.seed, 3])
    texts = [
        placeholder.prompt(*turn) + placeholder.answer(*turn)
        for scene in scenes[:1000]
        for turn in _turns(scene, rng)
    ]
    processor = make_processor(make_tokenizer(texts, recipe.vocabulary))
    model = make_model(processor.tokenizer)
    log.info(
        "%d parameters, %d tokens in the vocabulary",
        model.num_parameters(),
        len(processor.tokenizer),
    )

    train_tower(model, pixels, scenes, recipe)
    features = encode(model.eval(), pixels)
    align_projector(model, features, scenes, processor.tokenizer, recipe)
    train_language(model.train(), features, scenes, Conversation(tasks, processor), recipe)

    model.eval().half().save_pretrained(out)
    processor.save_pretrained(out)
    facts = {
        "recipe": asdict(recipe),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    (out / "recipe.json").write_text(
        json.dumps(facts | {"minutes": round((time.time() - started) / 60, 1)}, indent=2) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="new folder for model, processor and recipe.json")
    folder = parser.parse_args().folder
    if folder.exists():
        parser.error(f"{folder} exists; name a new folder")
    # before lmms-eval is imported, which reads them
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("LOGURU_LEVEL", "WARNING")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    from secateur.tasks.load import load_tasks

    train(Recipe(), load_tasks(list(TRAINED_TASKS), build(Path("results/data/shapes"))), folder)


if __name__ == "__main__":
    main()
