"""Invariants of injection, measured on tiny random models of every family.

`scripts/invariants.py` prints the table. What a pruned model answers is compared with the plain
model, or with references that share nothing with injection (`secateur.subject`). Which positions
are kept is read from the embeddings that the pruned language model receives.
"""

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from secateur.cache import EncodeCache
from secateur.efficiency.flops import count
from secateur.injection.encoder import Encoder, ImageCache
from secateur.pruners import InLLMPruner, Pruner, build
from secateur.subject import Subject

LAYER = 2  # where the method inside the language model cuts, of 4 layers
SAME, CLOSE = 0.0, 1e-4  # allowed differences of float32 logits
# images of each prompt of a batch, by their numbers in `subject.SIZES`
ONE, TWO_AND_ONE, TEXT_AND_ONE = [[0]], [[0, 1], [2]], [[], [1]]


def logits(output: Any) -> Tensor:
    """[B, new, V] logits of a generation."""
    return torch.stack(output.logits, 1)


def apart(found: Tensor, want: Tensor) -> float:
    """The largest difference; infinite where one is not a number."""
    difference = float((found - want).abs().max())
    return difference if difference == difference else float("inf")


def located(kept: Tensor, of: Tensor) -> Tensor:
    """[L] True at the rows of `of` [L, D] that `kept` [K, D] holds, in order.

    Raises:
        ValueError: `kept` is not a subsequence of it.
    """
    found, place = torch.zeros(len(of), dtype=torch.bool), -1
    for row in kept:
        equal = (of[place + 1 :] == row).all(1).nonzero()
        if not len(equal):
            raise ValueError("the pruned prompt has an embedding that the unpruned one has not")
        place += 1 + int(equal[0])
        found[place] = True
    return found


# --- the invariants, each measured on one subject


def all_kept_before(subject: Subject) -> float:
    """Keeping all tokens before the language model equals the plain model."""
    return _all_kept(subject, build("none"), [TWO_AND_ONE, TEXT_AND_ONE])


def all_kept_inside(subject: Subject) -> float:
    """Keeping all tokens inside the language model equals the plain model."""
    return _all_kept(subject, build("fastv", layer=LAYER, budget="after"), [ONE, [[0, 1]]])


def _all_kept(
    subject: Subject, pruner: Pruner | InLLMPruner, prompts: list[list[list[int]]]
) -> float:
    differences = []
    for one in prompts:
        batch = subject.batch(one)
        with subject.pruned(pruner, "full"):
            found = subject.generate(batch)
        differences.append(apart(logits(found), logits(subject.generate(batch))))
    return max(differences)


def subset_before(subject: Subject) -> float:
    """A subset kept before the language model equals the layers on that subset alone."""
    differences = []
    for prompts, policy in itertools.product([TWO_AND_ONE, TEXT_AND_ONE], subject.policies):
        batch = subject.batch(prompts)
        with subject.pruned(build("random"), "50%", positions=policy) as trace:
            output, first = subject.received(subject.generate, batch=batch)
        for number, row in enumerate(subject.rows(batch)):
            kept = first["inputs_embeds"][number]
            if first["attention_mask"] is not None:
                kept = kept[first["attention_mask"][number].bool()]
            stays = located(kept, row.embeds)
            left = sum(trace.audits[number].kept_tokens)
            if int((stays & row.visual).sum()) != left or not bool(stays[~row.visual].all()):
                raise ValueError(f"the audit says that {left} visual tokens were kept")
            new = output.sequences[number, batch["input_ids"].shape[1] :]
            want = subject.reference(row, stays, new, compact=policy == "compact")
            differences.append(apart(logits(output)[number], want))
    return max(differences)


def subset_inside(subject: Subject) -> float:
    """FastV's subset equals the layers on it; an eager model's attention ranks alike."""
    differences = []
    for prompts in (ONE, [[0, 1]]):
        batch = subject.batch(prompts)
        with subject.pruned(build("fastv", layer=LAYER, budget="after"), "50%") as trace:
            output = subject.generate(batch)
        (row,), (audit,) = subject.rows(batch), trace.audits
        places, starts = row.visual.nonzero()[:, 0], [0, *itertools.accumulate(audit.visual_tokens)]
        kept = [
            start + index
            for start, mine in zip(starts[:-1], audit.kept_indices, strict=True)
            for index in mine
        ]
        stays = ~row.visual
        stays[places[kept]] = True
        new = output.sequences[0, batch["input_ids"].shape[1] :]
        differences.append(
            apart(logits(output)[0], subject.reference(row, stays, new, layer=LAYER))
        )
        if subject.model.config._attn_implementation == "eager":
            attention = subject.model(**batch, output_attentions=True).attentions[LAYER - 1]
            highest = attention[0, :, -1, places].mean(0).topk(len(kept)).indices
            if sorted(highest.tolist()) != kept:
                raise ValueError("FastV kept other tokens than the model's own attention says")
    return max(differences)


def batch_as_singles(subject: Subject) -> float:
    """Prompts of a batch are answered as alone."""
    prompts, differences = [[0], [1]], []
    for pruner in (build("random"), build("divprune")):
        with subject.pruned(pruner, "50%", names="ab"):
            together = logits(subject.generate(subject.batch(prompts)))
        for number, name in enumerate("ab"):
            with subject.pruned(pruner, "50%", names=name):
                alone = subject.generate(subject.batch([prompts[number]], first=number))
            differences.append(apart(together[number], logits(alone)[0]))
    return max(differences)


def text_alone(subject: Subject) -> float:
    """Prompts without an image pass through."""
    batch, differences = subject.batch([[], []]), []
    want = logits(subject.generate(batch))
    for pruner in (build("random"), build("fastv", layer=LAYER)):
        with subject.pruned(pruner, "50%"):
            differences.append(apart(logits(subject.generate(batch)), want))
    return max(differences)


def cached_images(subject: Subject) -> float:
    """Images from the cache, which are encoded one by one, give the answers without a cache."""
    batch, images, found = subject.batch(TWO_AND_ONE), ImageCache(EncodeCache(2**30), ""), []
    for cache in (None, images, images):
        with subject.pruned(build("random"), "50%", cache=cache):
            found.append(logits(subject.generate(batch)))
    without, encoded, cached = found
    if not images.cache.counts.memory_hits or not torch.equal(encoded, cached):
        raise ValueError("the second call found no image in the cache, or answers otherwise")
    return apart(cached, without)


def encoded_before(subject: Subject) -> float | None:
    """Images that are encoded before `generate` give the same answers, if it takes any."""
    if "mm_encoder_outputs" not in inspect.signature(subject.model.forward).parameters:
        return None
    batch, core = dict(subject.batch(TWO_AND_ONE)), subject.model.model
    names = inspect.signature(core.get_image_features).parameters.keys() & batch.keys()
    given = {name: batch[name] for name in names}
    rest = {n: v for n, v in batch.items() if n not in given or n == "image_grid_thw"}
    with subject.pruned(build("random"), "50%"):
        want = logits(subject.generate(batch))
    with subject.pruned(build("random"), "50%"):
        output = core.get_image_features(**given, return_dict=True)
        found = subject.generate(rest, mm_encoder_outputs={"image": output})
    return apart(logits(found), want)


def saliency(subject: Subject) -> float | None:
    """The captured saliency equals the attention that the eager encoder gives out, if it does."""
    if subject.model.config._attn_implementation != "eager":
        return None
    batch, core = subject.batch(ONE), subject.model.model
    images = {name: batch[name] for name in subject.adapter.IMAGE_ARGUMENTS}
    want = subject.family.encoder_saliency(subject.model, images)
    if want is None:
        return None
    encoder = Encoder(subject.adapter, frozenset({"saliency"}), None, core.get_image_features)
    encoder(**images)
    return apart(torch.cat([image.captures["saliency"] for image in encoder.images]), want)


def flops(subject: Subject) -> float:
    """The FLOPs of a pruned prompt by the formulas, against torch's counter: their difference."""
    batch, pruner = subject.batch(ONE), build("uniform")
    with subject.pruned(pruner, "50%") as trace, FlopCounterMode(display=False) as counter:
        subject.model(**batch, use_cache=True, logits_to_keep=1)
    (audit,) = trace.audits
    angles = sum(
        sum(operations.values())
        for name, operations in counter.get_flop_counts().items()
        if name.endswith("rotary_emb")  # early releases compute angles as a product of matrices
    )
    want = count(
        subject.model.config,
        layer_tokens=audit.layer_tokens,
        text_tokens=audit.prompt_tokens - audit.layer_tokens[0],
        crops=subject.family.crops(subject.model.config, batch),
    )
    return abs(counter.get_total_flops() - angles - want.first_token)


# name -> what is measured, and how much it may be
INVARIANTS: dict[str, tuple[Callable[[Subject], float | None], float]] = {
    "all kept before the LLM": (all_kept_before, SAME),
    "all kept inside the LLM": (all_kept_inside, SAME),
    "subset kept before the LLM": (subset_before, CLOSE),
    "subset kept inside the LLM": (subset_inside, CLOSE),
    "batch as single prompts": (batch_as_singles, CLOSE),
    "prompts without an image": (text_alone, SAME),
    "images from the cache": (cached_images, CLOSE),
    "images encoded before": (encoded_before, SAME),
    "saliency of the encoder": (saliency, 1e-5),
    "FLOPs against the counter": (flops, SAME),
}


@torch.no_grad()
def measure(model_type: str, attention: str) -> dict[str, float | None]:
    """The largest difference of every invariant on a family; None: it does not apply.

    Args:
        attention: kernel, sdpa or eager.

    Raises:
        ValueError: an invariant is broken in another way than by a difference.
    """
    subject = Subject(model_type, attention)
    return {name: check(subject) for name, (check, _) in INVARIANTS.items()}


def table(found: dict[str, list[dict[str, float | None]]]) -> tuple[str, list[str]]:
    """A Markdown table of what `measure` found, and what is above its bound.

    Args:
        found: for every family what was measured with each kernel; the table has the largest.
    """
    lines = [
        "| invariant | allowed | " + " | ".join(found) + " |",
        "|---|---:|" + "---:|" * len(found),
    ]
    broken = []
    for name, (_, bound) in INVARIANTS.items():
        row = []
        for family, kernels in found.items():
            values = [value for kernel in kernels if (value := kernel[name]) is not None]
            row.append(f"{max(values):.2g}" if values else "-")
            if values and not max(values) <= bound:
                broken.append(f"{family}: {name}: {max(values):.2g} is above {bound:g}")
        lines.append(f"| {name} | {bound:g} | " + " | ".join(row) + " |")
    return "\n".join(lines), broken
