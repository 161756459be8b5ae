"""Train the embedded model, a LLaVA of about two million parameters, on a CPU.

    python -m scripts.training.train_shapes START FOLDER    (`make train-shapes`)

START is the embedded model of version 1, of which the language model is taken: it can read the
tasks' prompts, and was trained with all visual tokens. The tower and the projector start from
random weights. All stages use generated scenes:

1. The tower alone learns which object and place each patch shows, and its CLS token learns which
   objects are in the scene and where, so that CLS attention means something.
2. The tower is frozen; the projector learns to show each object as version 1 did, and its place.
3. Projector and Llama learn to answer. Each question sees the scene and itself only, as at test
   time. Visual tokens are dropped at random, so that the language model knows short prompts; no
   pruning method takes part.
"""

import argparse
import json
import logging
import math
import os
import platform
import time
from collections import defaultdict
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    DynamicCache,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from scripts.training.data import (
    Conversation,
    Scenes,
    Turn,
    draw,
    normal,
    turns_of,
)
from scripts.training.model import make_model, make_processor, make_tokenizer, places
from scripts.training.recipe import Recipe, Stepper
from secateur.shapes.datasets import SIZES, build
from secateur.shapes.questions import kind_of
from secateur.shapes.scenes import KINDS, MOST, Scene

if TYPE_CHECKING:  # slow to import
    from lmms_eval.api.task import Task

log = logging.getLogger(__name__)


# --- stage 1: the tower


def train_tower(model: Any, data: Scenes, recipe: Recipe) -> None:
    tower, width = model.model.vision_tower, model.config.vision_config.hidden_size
    heads = nn.ModuleDict(
        {
            "kind": nn.Linear(width, 1 + len(KINDS)),
            "place": nn.Linear(width, 2),
            "middle": nn.Linear(width, 3 * len(KINDS)),
            "last": nn.Linear(width, 3 * len(KINDS)),
        }
    )
    step = Stepper(
        [*tower.named_parameters(), *heads.named_parameters()],
        (recipe.tower_muon_lr, recipe.tower_lr),
        recipe.warmup,
        recipe.tower_steps - recipe.warmup,
        recipe.tower_steps,
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    weight = torch.ones(1 + len(KINDS))
    weight[0] = 0.3  # most patches are ground
    for number in range(recipe.tower_steps):
        rows = torch.randint(len(data.pixels), (recipe.tower_batch,), generator=generator)
        states = tower(normal(data.pixels[rows]), output_hidden_states=True).hidden_states
        middle, last = states[model.config.vision_feature_layer], states[-1]
        patches = middle[:, 1:]
        kind = F.cross_entropy(
            heads["kind"](patches).flatten(0, 1), data.labels(rows).flatten(), weight=weight
        )
        place = F.mse_loss(heads["place"](patches), places().expand(len(rows), -1, -1))
        # per kind: is it there, and at which x and y
        present = F.one_hot(data.kinds[rows], 1 + len(KINDS))[:, :, 1:].float()
        there, where = present.sum(1), present.transpose(1, 2) @ data.centres[rows]
        loss = kind + 0.5 * place
        for name, cls in (("middle", middle[:, 0]), ("last", last[:, 0])):
            found = heads[name](cls).view(len(rows), len(KINDS), 3)
            loss = loss + 4 * F.binary_cross_entropy_with_logits(found[..., 0], there)
            distance = (found[..., 1:] - where).abs().sum(-1)
            loss = loss + 0.3 * (distance * there).sum() / there.sum()
        step(loss)
        if number % 50 == 0 or number == recipe.tower_steps - 1:
            parts = loss.item(), kind.item(), place.item()
            log.info("tower %d: loss %.3f, kind %.3f, place %.4f", number, *parts)


@torch.no_grad()
def encode(model: Any, pixels: Tensor) -> Tensor:
    """Encoder features [scenes, N, C], the projector's input."""
    tower, layer = model.model.vision_tower, model.config.vision_feature_layer
    return torch.cat(
        [
            tower(normal(part), output_hidden_states=True).hidden_states[layer][:, 1:]
            for part in pixels.split(128)
        ]
    )


# --- stage 2: the projector


@torch.no_grad()
def adopt(model: Any, tokenizer: Any, old: Any, old_tokenizer: Any) -> None:
    """Take an earlier model's Llama, and its embeddings of the words that it knows."""
    mine, theirs = model.model.language_model, old.model.language_model
    mine.layers.load_state_dict(theirs.layers.state_dict())
    mine.norm.load_state_dict(theirs.norm.state_dict())
    words, old_words = tokenizer.get_vocab(), old_tokenizer.get_vocab()
    new, was = zip(*[(words[w], old_words[w]) for w in words if w in old_words], strict=True)
    model.get_input_embeddings().weight[list(new)] = old.get_input_embeddings().weight[list(was)]
    model.lm_head.weight[list(new)] = old.lm_head.weight[list(was)]


@torch.no_grad()
def shown(old: Any, data: Scenes, count: int) -> Tensor:
    """[1 + kinds, D] the mean visual token that an earlier model gives ground and each kind.

    Of the first `count` scenes; of objects, only those as small as the earlier model knew them.
    """
    total, patches = torch.zeros(1 + len(KINDS), old.lm_head.in_features), torch.zeros(25)
    small = torch.ones(count, 1 + MOST, dtype=torch.bool)  # column 0: ground
    for row, scene in enumerate(data.scenes[:count]):
        for column, thing in enumerate(scene.things, start=1):
            small[row, column] = thing.radius < 12
    for rows in torch.arange(count).split(100):
        visual = old.model.multi_modal_projector(encode(old, data.pixels[rows]))
        labels, chosen = data.labels(rows), small[rows].gather(1, data.owners[rows] + 1)
        total.index_add_(0, labels[chosen], visual[chosen])
        patches += labels[chosen].bincount(minlength=len(patches))
    return total / patches.clamp_min(1)[:, None]


def align_projector(
    model: Any, features: Tensor, data: Scenes, targets: Tensor, tokenizer: Any, recipe: Recipe
) -> None:
    """Map patches to the `targets` of ground and kinds, and to words for their places.

    These are the words of side and half, the stronger the farther a patch is from the middle, and
    half as strong as the target.
    """
    projector = model.model.multi_modal_projector
    embed = model.get_input_embeddings().weight.detach()

    def word(text: str) -> Tensor:
        return embed[tokenizer(" " + text, add_special_tokens=False)["input_ids"]].sum(0)

    at = (3 * places()).tanh()
    sides = torch.cat([(-at).relu(), at.relu()], 1)  # [patches, 4]
    code = sides @ torch.stack([word(w) for w in ("left", "top", "right", "bottom")])
    strength = 0.5 * targets.norm(dim=1) / 8  # 8: norm of two words' sum
    with torch.no_grad():
        projector.linear_1.weight /= features[:256].std()
        projector.linear_2.weight *= 8
    step = Stepper(
        list(projector.named_parameters()),
        (0, recipe.align_lr),
        recipe.warmup,
        recipe.align_steps - recipe.warmup,
        recipe.align_steps,
    )
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    for number in range(recipe.align_steps):
        rows = torch.randint(len(features), (48,), generator=generator)
        labels = data.labels(rows)
        wanted = targets[labels] + strength[labels][..., None] * code
        error = (projector(features[rows]) - wanted).square().mean(-1)
        objects, ground = error[labels > 0].mean(), error[labels == 0].mean()
        step(objects / 25 + ground / 2)
        if number % 100 == 0 or number == recipe.align_steps - 1:
            log.info("align %d: objects %.3f, ground %.3f", number, objects.item(), ground.item())


# --- stage 3: projector and language model


def drop(owners: Tensor, recipe: Recipe, rng: np.random.Generator) -> Tensor:
    """Choose the visual tokens of a batch that stay.

    The same number in all rows. 60 % of the rows make the objects' tokens more likely, or less;
    30 % make some objects more likely than others.

    Returns:
        [B, K] ascending indices.
    """
    rows, count = owners.shape
    if rng.random() < recipe.keep_all:
        return torch.arange(count).expand(rows, -1)
    keep = round(count * math.exp(rng.uniform(math.log(recipe.keep_least), 0)))
    objects = rng.normal(0, 3, (rows, 1)) * (rng.random((rows, 1)) < 0.6)
    single = rng.normal(0, 2, (rows, 1 + MOST)) * (rng.random((rows, 1)) < 0.3)
    likely = torch.from_numpy(rng.gumbel(size=(rows, count)) + objects * (owners.numpy() >= 0))
    likely += torch.from_numpy(single).gather(1, owners + 1)
    return likely.topk(keep, dim=1).indices.sort(1).values


def answers(
    model: Any, features: Tensor, items: list[list[Turn]], together: int = 64
) -> tuple[Tensor, Tensor, list[int]]:
    """Run all turns about each scene; each sees its scene and itself only.

    The keys and values of a scene are computed once. Turns of about the same length run together.

    Args:
        features: [B, K, C] encoder features of the tokens that stay.
        items: the turns of each scene.
        together: how many turns run at once.

    Returns:
        [A, V] logits where an answer's tokens are predicted, [A] these tokens, and the number of
        the turn of each, counted over all scenes.
    """
    language, embed = model.model.language_model, model.get_input_embeddings()
    before = embed(torch.tensor(items[0][0][0])).expand(len(features), -1, -1)
    scene = torch.cat([before, model.model.multi_modal_projector(features)], 1)
    cache: Any = DynamicCache()
    language(inputs_embeds=scene, cache=cache)
    turns = [(row, turn) for row, own in enumerate(items) for turn in own]
    by_length = sorted(range(len(turns)), key=lambda i: sum(map(len, turns[i][1])))
    logits, targets, numbers = [], [], []
    for chosen in (by_length[i : i + together] for i in range(0, len(turns), together)):
        own = DynamicCache()
        scenes = torch.tensor([turns[i][0] for i in chosen])
        for layer, kept in enumerate(cache.layers):
            own.update(kept.keys[scenes], kept.values[scenes], layer)
        ids = [turns[i][1][1] + turns[i][1][2][:-1] for i in chosen]
        longest = max(map(len, ids))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        states = language(inputs_embeds=embed(padded), cache=own).last_hidden_state
        for row, i in enumerate(chosen):
            _, after, answer = turns[i][1]
            logits.append(states[row, len(after) - 1 : len(after) - 1 + len(answer)])
            targets += answer
            numbers += [i] * len(answer)
    return model.lm_head(torch.cat(logits)), torch.tensor(targets), numbers


def train_language(
    model: Any, features: Tensor, data: Scenes, talk: Conversation, recipe: Recipe, out: Path
) -> None:
    """Train projector and language model; save them to `out` every 100 steps."""
    model.model.vision_tower.requires_grad_(False)
    step = Stepper(
        [(name, p) for name, p in model.named_parameters() if p.requires_grad],
        (recipe.muon_lr, recipe.lr),
        recipe.warmup,
        recipe.decay_steps,
        recipe.steps,
    )
    rng = np.random.default_rng([recipe.seed, 1])
    held_out = range(len(features) - 64, len(features))
    losses, started = [], time.time()
    for number in range(1, recipe.steps + 1):
        rows = torch.from_numpy(rng.integers(0, held_out.start, recipe.batch))
        kept = drop(data.owners[rows], recipe, rng)
        items = [[talk.ids(*turn) for turn in turns_of(data.scenes[i], rng)] for i in rows]
        logits, targets, _ = answers(model, features[rows[:, None], kept], items)
        loss = F.cross_entropy(logits, targets)
        step(loss)
        losses.append(loss.item())
        if number % 50 == 0 or number == recipe.steps:
            took = (time.time() - started) / number
            log.info("language %d: loss %.3f, %.2f s per step", number, np.mean(losses[-50:]), took)
        if number % 100 == 0 or number == recipe.steps:
            log.info("right answers: %s", validate(model, features, data.scenes, talk, held_out))
            save(model, talk.processor, out)


@torch.no_grad()
def validate(
    model: Any, features: Tensor, scenes: list[Scene], talk: Conversation, held_out: range
) -> dict[str, float]:
    """Share of right answers with all visual tokens, per data set and per kind of question.

    An answer is right if every token of it has the largest logit.
    """
    rng = np.random.default_rng(5)
    turns = [turns_of(scenes[i], rng) for i in held_out]
    items = [[talk.ids(*turn) for turn in row] for row in turns]
    logits, targets, numbers = answers(model, features[list(held_out)], items)
    wrong = set(np.array(numbers)[(logits.argmax(-1) != targets).numpy()])
    right = defaultdict(list)
    for number, (task, doc) in enumerate(turn for row in turns for turn in row):
        for name in (task, kind_of(doc["question"])):
            right[name].append(number not in wrong)
    return {name: round(float(np.mean(hits)), 2) for name, hits in right.items()}


# --- the whole


def save(model: Any, processor: LlavaProcessor, out: Path) -> None:
    """Save the model in float16, and its processor."""
    deepcopy(model).eval().half().save_pretrained(out)
    processor.save_pretrained(out)


def train(recipe: Recipe, tasks: "dict[str, Task]", start: Path, out: Path) -> None:
    """Train with the language model in `start`; save model, processor and recipe.json to `out`."""
    started = time.time()
    torch.manual_seed(recipe.seed)
    data = draw(recipe.scenes, recipe.seed)
    log.info("%d scenes drawn in %.0f s", recipe.scenes, time.time() - started)

    placeholder = Conversation(tasks, make_processor(make_tokenizer([], 512)))
    rng = np.random.default_rng([recipe.seed, 3])
    texts = [
        placeholder.prompt(*turn) + placeholder.answer(*turn)
        for scene in data.scenes[:1000]
        for turn in turns_of(scene, rng)
    ]
    processor = make_processor(make_tokenizer(texts, recipe.vocabulary))
    model = make_model(processor.tokenizer)
    sizes = model.num_parameters(), len(processor.tokenizer)
    log.info("%d parameters, %d tokens in the vocabulary", *sizes)

    train_tower(model, data, recipe)
    features = encode(model.eval(), data.pixels)
    old = LlavaForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    adopt(model, processor.tokenizer, old, AutoTokenizer.from_pretrained(start))
    targets = shown(old, data, recipe.shown_scenes)
    align_projector(model, features, data, targets, processor.tokenizer, recipe)
    train_language(model.train(), features, data, Conversation(tasks, processor), recipe, out)
    facts = {
        "recipe": asdict(recipe),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "minutes": round((time.time() - started) / 60, 1),
    }
    (out / "recipe.json").write_text(json.dumps(facts, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("start", type=Path, help="folder with the embedded model of version 1")
    parser.add_argument("folder", type=Path, help="new folder for model, processor and recipe.json")
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} exists; name a new folder")
    if not options.start.exists():
        parser.error(f"there is no {options.start}; `make train-shapes` gets it from git")
    # before lmms-eval is imported, which reads them
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("LOGURU_LEVEL", "WARNING")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    from secateur.tasks.load import load_tasks

    tasks = load_tasks(list(SIZES), build(Path("results/data/shapes")))
    train(Recipe(), tasks, options.start, options.folder)


if __name__ == "__main__":
    main()
