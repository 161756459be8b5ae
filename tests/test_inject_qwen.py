"""Injection into a tiny real Qwen2.5-VL, Qwen2-VL and Qwen3-VL.

M-RoPE, images of different sizes, grouped queries, DeepStack.
"""

import inspect
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from PIL import Image
from test_inject import QUESTIONS, STEPS, logits
from torch import Tensor

from secateur.injection import Sample, inject
from secateur.pruners import REGISTRY, Pruner, Selection, VisualTokens, build

# 7 x 5, 4 x 6 and 8 x 4 tokens of patches of 14 pixels; windows are 2 x 2
SIZES = [(140, 196), (168, 112), (112, 224)]


def scene(size: tuple[int, int], seed: int = 0) -> Image.Image:
    width, height = size
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    )


def encode(processor, sizes: list[list[tuple[int, int]]], first: int = 0):
    """One prompt a list of image sizes (width, height); `first` counts questions and scenes.

    Sizes are in pixels of patches of 14; where patches are of 16, as many tokens are more pixels.
    """
    patch = processor.image_processor.patch_size
    image = "<|vision_start|><|image_pad|><|vision_end|>, "
    texts = [
        f"<|im_start|>user\nlook {image * len(row)}{question}<|im_end|>\n<|im_start|>assistant\n"
        for row, question in zip(sizes, QUESTIONS[first:], strict=False)
    ]
    images = [
        scene((width * patch // 14, height * patch // 14), first + i)
        for i, (width, height) in enumerate(size for row in sizes for size in row)
    ]
    return processor(text=texts, images=images or None, padding=True, return_tensors="pt")


@dataclass(frozen=True)
class Chosen(Pruner):
    """Keeps given tokens of every image, by the name of the image."""

    kept: dict[str, list[int]]

    name = "chosen"
    paper = "-"
    status = "baseline"
    needs = frozenset({"features"})

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        return Selection(torch.tensor([self.kept[name] for name in tokens.sample_ids]))


@dataclass
class Row:
    """One prompt without padding, as the language model gets it."""

    embeds: Tensor  # [L, D]
    positions: Tensor  # [3, L]
    end: int  # the first position behind it
    visual: list[Tensor]  # places of every image
    deep: list[Tensor]  # [sum of places, D] what DeepStack adds to them after each first layer


@torch.no_grad()
def prompts(model, inputs) -> list[Row]:
    """The rows of a call, with M-RoPE's coordinates written out."""
    ids, image = inputs["input_ids"], model.config.image_token_id
    grids, features, levels = [], [], []
    if "pixel_values" in inputs:
        grids = [(h // 2, w // 2) for _, h, w in inputs["image_grid_thw"].tolist()]
        output = model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        features = list(output.pooler_output)
        levels = [
            level if isinstance(level, Tensor) else torch.cat(level)
            for level in getattr(output, "deepstack_features", [])
        ]
    rows = []
    for b, real in enumerate(inputs["attention_mask"].bool()):
        row = ids[b, real]
        embeds, axes, visual, end, place = model.get_input_embeddings()(row), [], [], 0, 0
        while place < len(row):
            if row[place] != image:
                axes.append(torch.full((3, 1), end))
                end, place = end + 1, place + 1
                continue
            height, width = grids.pop(0)
            places = place + torch.arange(height * width)
            embeds[places] = features.pop(0)
            line, column = (
                torch.arange(height).repeat_interleave(width),
                torch.arange(width).repeat(height),
            )
            axes.append(end + torch.stack([torch.zeros_like(line), line, column]))
            visual.append(places)
            end, place = end + max(height, width), place + height * width
        count = sum(map(len, visual))
        deep, levels = (
            [level[:count] for level in levels],
            [level[count:] for level in levels],
        )
        rows.append(Row(embeds, torch.cat(axes, 1), end, visual, deep))
    return rows


def kept_rows(rows: list[Row], kept: list[list[list[int]]]) -> list[Row]:
    """The rows with the kept tokens of every image only; positions stay."""
    short = []
    for row, indices in zip(rows, kept, strict=True):
        stays = torch.ones(len(row.embeds), dtype=torch.bool)
        for places, mine in zip(row.visual, indices, strict=True):
            stays[places] = False
            stays[places[mine]] = True
        deep = [level[stays[torch.cat(row.visual)]] for level in row.deep]
        places = [(stays.cumsum(0) - 1)[torch.cat(row.visual)[stays[torch.cat(row.visual)]]]]
        short.append(Row(row.embeds[stays], row.positions[:, stays], row.end, places, deep))
    return short


@torch.no_grad()
def reference(model, rows: list[Row], new: Tensor) -> Tensor:
    """Logits of the language model on these rows and their answers.

    One row at a time, without cache, mask or hooks.
    """
    answers = []
    for row, tokens in zip(rows, new, strict=True):
        sequence = torch.cat([row.embeds, model.get_input_embeddings()(tokens[:-1])])
        behind = row.end + torch.arange(len(tokens) - 1).expand(3, -1)
        deep = {}
        if row.deep:
            mask = torch.zeros(1, len(sequence), dtype=torch.bool)
            mask[0, torch.cat(row.visual)] = True
            deep = {"visual_pos_masks": mask, "deepstack_visual_embeds": row.deep}
        hidden = model.model.language_model(
            inputs_embeds=sequence[None],
            position_ids=torch.cat([row.positions, behind], 1)[:, None],
            attention_mask=torch.ones(1, len(sequence), dtype=torch.long),
            use_cache=False,
            **deep,
        ).last_hidden_state
        answers.append(model.lm_head(hidden[0, len(row.embeds) - 1 :]))
    return torch.stack(answers)


def some(count: int, seed: int) -> list[int]:
    """A quarter of the tokens."""
    return (
        torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: (count + 2) // 4]
        .sort()
        .values.tolist()
    )


CASES = {
    "one": [[SIZES[0]]],
    "two rows": [[SIZES[0]], [SIZES[1]]],
    "two images": [[SIZES[1], SIZES[2]]],
    "two images and one": [[SIZES[0], SIZES[1]], [SIZES[2]]],
}


@pytest.mark.parametrize("case", CASES)
class TestAnswers:
    def test_keeping_all_changes_no_bit(self, qwen_model, qwen_processor, case):
        inputs = encode(qwen_processor, CASES[case])
        plain = qwen_model.generate(**inputs, **STEPS)
        for pruner in (build("none"), build("scope")):
            with inject(qwen_model, pruner, "full"):
                kept = qwen_model.generate(**inputs, **STEPS)
            assert torch.equal(kept.sequences, plain.sequences)
            assert torch.equal(logits(kept), logits(plain))

    def test_a_subset_equals_the_model_fed_only_that_subset(self, qwen_model, qwen_processor, case):
        inputs = encode(qwen_processor, CASES[case])
        rows = prompts(qwen_model, inputs)
        kept = [[some(len(places), seed=i) for i, places in enumerate(row.visual)] for row in rows]
        named = {f"{b}|{i}": indices for b, row in enumerate(kept) for i, indices in enumerate(row)}
        with inject(qwen_model, Chosen(named), "25%") as trace:
            pruned = qwen_model.generate(**inputs, **STEPS)
        new = pruned.sequences[:, inputs["input_ids"].shape[1] :]
        assert (
            logits(pruned) - reference(qwen_model, kept_rows(rows, kept), new)
        ).abs().max() < 1e-4
        assert (
            logits(pruned) - logits(qwen_model.generate(**inputs, **STEPS))
        ).abs().max() > 0.1  # it does matter
        assert [
            [list(indices) for indices in record.kept_indices] for record in trace.audits
        ] == kept
        assert torch.equal(pruned.sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])

    def test_generated_tokens_stand_behind_the_unpruned_prompt(
        self, qwen_model, qwen_processor, case
    ):
        inputs, seen = encode(qwen_processor, CASES[case]), []
        with inject(qwen_model, build("uniform"), "25%"):
            handle = qwen_model.model.language_model.register_forward_pre_hook(
                lambda _module, _args, kwargs: seen.append(kwargs["position_ids"][-3:]),
                with_kwargs=True,
            )
            qwen_model.generate(**inputs, **STEPS)
            handle.remove()
        for b, row in enumerate(prompts(qwen_model, inputs)):
            assert int(seen[0][:, b].max()) == row.end - 1
            for step, positions in enumerate(seen[1:]):
                assert positions[:, b].tolist() == [[row.end + step]] * 3


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.17"),
    reason="generate of 5.0 does not take embeddings and M-RoPE positions",
)
def test_a_subset_equals_generation_from_its_embeddings(qwen_model, qwen_processor):
    """Another way to prune: `generate` gets the shortened prompt itself and counts positions."""
    if qwen_model.config.model_type == "qwen3_vl":
        pytest.skip("embeddings alone leave DeepStack out")
    for size in SIZES:
        inputs = encode(qwen_processor, [[size]])
        with inject(qwen_model, build("random"), "25%") as trace:
            pruned = qwen_model.generate(**inputs, **STEPS)
        (row,) = kept_rows(prompts(qwen_model, inputs), [[list(trace.audits[0].kept_indices[0])]])
        options = {
            "inputs_embeds": row.embeds[None],
            "attention_mask": torch.ones(1, len(row.embeds), dtype=torch.long),
        }
        output = qwen_model.generate(**options, position_ids=row.positions[:, None], **STEPS)
        assert torch.equal(logits(pruned), logits(output))
        # token by token it takes the offset between positions and the shortened frame
        with torch.no_grad():
            step = qwen_model(**options, position_ids=row.positions[:, None], use_cache=True)
            qwen_model.model.rope_deltas = torch.tensor([[row.end - len(row.embeds)]])
            for number, want in enumerate(output.logits):
                assert (step.logits[:, -1] - want).abs().max() < 1e-4
                step = qwen_model(
                    input_ids=output.sequences[:, number : number + 1],
                    past_key_values=step.past_key_values,
                )


def test_rows_of_a_batch_equal_the_rows_alone(qwen_model, qwen_processor):
    with inject(qwen_model, build("scope"), "25%") as trace:
        together = qwen_model.generate(
            **encode(qwen_processor, [[size] for size in SIZES]), **STEPS
        )
        for row, size in enumerate(SIZES):
            one = qwen_model.generate(**encode(qwen_processor, [[size]], first=row), **STEPS)
            assert (logits(one)[0] - logits(together)[row]).abs().max() < 1e-4
            assert trace.audits[-1].kept_indices == trace.audits[row].kept_indices


def test_the_audit_equals_the_budget(qwen_model, qwen_processor):
    inputs = encode(qwen_processor, [[SIZES[0], SIZES[1]], [SIZES[2]]])
    for budget, keeps in (
        ("33.3%", (12, 8, 11)),
        (5, (5, 5, 5)),
        (0.111, (4, 3, 4)),
        ("full", (35, 24, 32)),
    ):
        for name in ("random", "fastervlm", "divprune"):
            with inject(qwen_model, build(name), budget) as trace:
                qwen_model.generate(**inputs, max_new_tokens=1)
            first, second = trace.audits
            assert first.visual_tokens == (35, 24)
            assert second.visual_tokens == (32,)
            assert first.kept_tokens + second.kept_tokens == keeps
            assert tuple(map(len, first.kept_indices + second.kept_indices)) == keeps
            assert first.layer_tokens == (keeps[0] + keeps[1],) * 4
            assert (
                first.prompt_tokens
                == int(inputs["attention_mask"][0].sum()) - 59 + keeps[0] + keeps[1]
            )


def test_a_prompt_without_image_passes_through(qwen_model, qwen_processor):
    inputs = encode(qwen_processor, [[], []])
    plain = qwen_model.generate(**inputs, **STEPS)
    for pruner in (build("scope"), build("fastv", layer=1)):
        with inject(qwen_model, pruner, 4) as trace:
            output = qwen_model.generate(**inputs, **STEPS)
        assert torch.equal(logits(output), logits(plain))
        assert trace.audits[0].visual_tokens == ()


# methods before the language model: as they are configured for this family, or why they cannot run
RUNS = {
    "cdpruner": {"relevance_space": "llm_embed"},
    "divprune": {},
    "fastervlm": {},
    "fsr": {"relevance_space": "none"},
    "hiprune": {},
    "holov": {},
    "none": {},
    "pooling": {},
    "promprune": {"mu": 0.5744},
    "prunesid": {"variant": "qwen"},
    "prunesid_dyn": {"variant": "qwen"},
    "random": {},
    "scope": {},
    "sppruner": {"relevance_space": "llm_embed"},
    "trimtokenator": {},
    "uniform": {},
    "visionzip": {"keep_cls": False},
    "vispruner": {},
    "zspaprune": {},
}
REFUSED = {
    "prumerge": ({}, "{} models do not provide last_keys, last_queries: .* no CLS"),
    "prumerge_plus": ({}, "{} models do not provide last_keys, last_queries: .* no CLS"),
    "prunesid": ({}, "{} models do not provide cls_token: .*variant=qwen"),
    "visionzip": ({}, "{} models do not provide cls_token: .*keep_cls=false"),
    "cdpruner": ({}, "CLIP"),
    "hired": ({}, "{} models do not provide first_saliency: .* no CLS"),
    "trim": ({}, "CLIP"),
    "tome": ({}, "inside the image encoder of qwen.* models: .* without windows"),
}


# in messages
NAMES = {"qwen2_vl": r"Qwen2-VL", "qwen2_5_vl": r"Qwen2\.5-VL", "qwen3_vl": "Qwen3-VL"}


def test_every_method_before_the_language_model_is_listed():
    assert {
        name for name, method in REGISTRY.items() if issubclass(method, Pruner)
    } == RUNS.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", RUNS)
def test_a_method_runs(qwen_eager, qwen_processor, name):
    sizes = [(224, 168), (112, 336)]  # 48 tokens each, an even number of rows and columns
    inputs = encode(qwen_processor, [[size] for size in sizes])
    with inject(
        qwen_eager, build(name, **RUNS[name]), "full" if name == "none" else "25%"
    ) as trace:
        trace.announce([Sample("a", (70, 80, 81)), Sample("b", (75,))])
        output = qwen_eager.generate(**inputs, **STEPS)
    assert torch.isfinite(logits(output)).all()
    assert torch.equal(logits(output), logits(qwen_eager.generate(**inputs, **STEPS))) == (
        name == "none"
    )
    if name not in ("none", "prunesid", "prunesid_dyn"):  # the latter's own least number is 16
        assert [record.kept_tokens for record in trace.audits] == [(12,), (12,)]


@pytest.mark.parametrize("name", REFUSED)
def test_a_method_that_cannot_run_says_why(qwen_eager, qwen_processor, name):
    options, message = REFUSED[name]
    message = message.format(NAMES[qwen_eager.config.model_type])
    with pytest.raises(ValueError, match=message), inject(qwen_eager, build(name, **options), 4):
        qwen_eager.generate(**encode(qwen_processor, [[SIZES[0]]]), max_new_tokens=1)


def test_settings_of_other_families_are_errors(qwen_eager):
    for options in ({"positions": "compact"}, {"layout": "anyres"}):
        with (
            pytest.raises(ValueError, match=next(iter(options))),
            inject(qwen_eager, build("scope"), 4, **options),
        ):
            pass


def test_a_batch_with_a_row_of_text_alone(qwen_model, qwen_processor):
    with inject(qwen_model, build("scope"), "25%") as trace:
        batch = encode(qwen_processor, [[SIZES[0]], []])
        together = qwen_model.generate(**batch, **STEPS)
        assert [audit.visual_tokens for audit in trace.audits] == [(35,), ()]
        for row, sizes in enumerate([[SIZES[0]], []]):
            one = qwen_model.generate(**encode(qwen_processor, [sizes], first=row), **STEPS)
            assert (logits(one)[0] - logits(together)[row]).abs().max() < 1e-4


class TestCalls:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_beams": 2}, "beam search, or several"),
            ({"do_sample": True, "num_return_sequences": 2}, "beam search, or several"),
            ({"use_cache": False}, "use_cache=False"),
            ({"cache_implementation": "static"}, "cache_implementation='static'"),
            ({"prefill_chunk_size": 16}, "prefill_chunk_size"),
        ],
    )
    @pytest.mark.parametrize("name", ["uniform", "fastv"])
    def test_what_llava_refuses_is_refused(
        self, qwen_model, qwen_processor, name, options, message
    ):
        pruner = build("fastv", layer=1) if name == "fastv" else build(name)
        inputs = encode(qwen_processor, CASES["one"])
        with inject(qwen_model, pruner, "50%"):
            with pytest.raises(ValueError, match=message):
                qwen_model.generate(**inputs, **STEPS | options)
            first = qwen_model.generate(**inputs, **STEPS)
            ids = torch.cat([first.sequences, torch.tensor([[20, 21]])], 1)
            second = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with pytest.raises(ValueError, match="A second turn cannot go on"):
                qwen_model.generate(**second, **STEPS, past_key_values=first.past_key_values)


METHODS = [build("none"), build("scope"), build("fastv", layer=1)]


class TestTextPositions:
    """transformers numbers images as text, without an error, where M-RoPE's inputs are missing."""

    @pytest.fixture(autouse=True)
    def types(self, qwen_model):
        if "mm_token_type_ids" not in inspect.signature(qwen_model.forward).parameters:
            pytest.skip("this release reads the places of images from input_ids")

    @pytest.mark.parametrize("pruner", METHODS, ids=lambda pruner: pruner.name)
    def test_generate_without_token_types_is_refused(self, qwen_model, qwen_processor, pruner):
        inputs = encode(qwen_processor, CASES["two rows"])
        right = logits(qwen_model.generate(**inputs, **STEPS))
        del inputs["mm_token_type_ids"]
        assert (logits(qwen_model.generate(**inputs, **STEPS)) - right).abs().max() > 0.1
        message = (
            f"{NAMES[qwen_model.config.model_type]} got the positions of text for an image of "
            "7 x 5 tokens.* mm_token_type_ids or image_grid_thw"
        )
        with inject(qwen_model, pruner, "full"), pytest.raises(ValueError, match=message):
            qwen_model.generate(**inputs, **STEPS)

    @pytest.mark.parametrize("pruner", METHODS, ids=lambda pruner: pruner.name)
    def test_encoded_images_without_their_grids_are_refused(
        self, qwen_model, qwen_processor, pruner
    ):
        if "mm_encoder_outputs" not in inspect.signature(qwen_model.forward).parameters:
            pytest.skip("this release takes no encoded images")
        inputs = encode(qwen_processor, CASES["one"])
        pixels = {name: inputs.pop(name) for name in ("pixel_values", "image_grid_thw")}

        def call(**grid):
            image = qwen_model.model.get_image_features(**pixels, return_dict=True)
            options = {"mm_encoder_outputs": {"image": image}} | grid
            return logits(qwen_model.generate(**inputs, **options, **STEPS))

        right = call(image_grid_thw=pixels["image_grid_thw"])
        assert (call() - right).abs().max() > 0.1
        with inject(qwen_model, pruner, "full"):
            assert torch.equal(call(image_grid_thw=pixels["image_grid_thw"]), right)
            with pytest.raises(ValueError, match="got the positions of text for an image of 7 x 5"):
                call()

    def test_the_second_image_of_the_second_prompt_is_looked_at(self, qwen_model, qwen_processor):
        inputs = encode(qwen_processor, [[SIZES[0]], [SIZES[1], SIZES[2]]])
        with inject(qwen_model, build("scope"), "25%"):
            qwen_model.generate(**inputs, **STEPS)
        seen = {}
        handle = qwen_model.model.language_model.register_forward_pre_hook(
            lambda _module, _args, kwargs: seen.update(kwargs), with_kwargs=True
        )
        with torch.no_grad():
            qwen_model(**inputs)
        handle.remove()
        positions = seen["position_ids"].clone()
        places = (inputs["input_ids"][1] == qwen_model.config.image_token_id).nonzero()[:, 0]
        positions[-1, 1, places[-1]] += 1
        message = "an image of 8 x 4 tokens"
        with inject(qwen_model, build("scope"), "25%"), pytest.raises(ValueError, match=message):
            qwen_model(**inputs, position_ids=positions)
