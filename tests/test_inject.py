"""The contract of `inject`, on a tiny real LLaVA.

It covers what the pruned model computes, and that the block leaves nothing on the model.
"""

import gc
import subprocess
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import picture, tiny_model
from torch import Tensor

from secateur.injection import Sample, inject
from secateur.pruners import Pruner, PrunerError, Selection, VisualTokens, build
from secateur.pruners.base import EXTRA

ROOT = Path(__file__).resolve().parents[1]
N = 16
STEPS = {
    "do_sample": False,
    "max_new_tokens": 8,
    "min_new_tokens": 8,
    "output_logits": True,
    "return_dict_in_generate": True,
}
QUESTIONS = ["what is this, and why?", "short", "a question of another length still"]


@dataclass(frozen=True)
class Fixed(Pruner):
    """Keeps given rows of indices, or shifts one list along the batch."""

    rows: tuple[tuple[int, ...], ...] = ()
    custom_order: bool = False
    counts: tuple[int, ...] | None = None

    name = "fixed"
    paper = "-"
    status = "baseline"

    @property
    def adaptive(self) -> bool:  # type: ignore[override]
        return self.counts is not None

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        counts = None if self.counts is None else torch.tensor(self.counts)
        return Selection(torch.tensor(self.rows), custom_order=self.custom_order, counts=counts)


def encode(processor, batch: int, images_each: int = 1):
    texts = [f"USER: {'<image>' * images_each}\n{QUESTIONS[i]} ASSISTANT:" for i in range(batch)]
    return processor(
        text=texts,
        images=[picture(i) for i in range(batch * images_each)],
        padding=True,
        return_tensors="pt",
    )


def logits(output) -> Tensor:
    return torch.stack(output.logits, 1)


@torch.no_grad()
def reference(model, inputs, kept: list[list[int]], new: Tensor, positions: str) -> Tensor:
    """Logits of the language model on the kept tokens, row by row, without cache, mask or hooks."""
    core, image = model.model, model.config.image_token_id
    features = torch.cat(core.get_image_features(inputs["pixel_values"]).pooler_output)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).masked_scatter(
        (inputs["input_ids"] == image)[..., None], features
    )
    rows = []
    for b, indices in enumerate(kept):
        ids, real = inputs["input_ids"][b], inputs["attention_mask"][b].bool()
        visual = (ids == image).nonzero()[:, 0]
        before, after = int(visual[0]), int(visual[-1])
        places = torch.arange(len(ids))
        order = torch.cat([places[:before][real[:before]], visual[indices], places[after + 1 :]])
        sequence = torch.cat([embeds[b, order], model.get_input_embeddings()(new[b, :-1])])
        position = torch.arange(len(sequence))
        if positions == "original":
            start = int((~real).sum())
            position = torch.cat([order - start, int(real.sum()) + torch.arange(len(new[b]) - 1)])
        ones = torch.ones(1, len(sequence), dtype=torch.long)
        hidden = core.language_model(
            inputs_embeds=sequence[None],
            position_ids=position[None],
            attention_mask=ones,
            use_cache=False,
        ).last_hidden_state
        rows.append(model.lm_head(hidden[0, len(order) - 1 :]))
    return torch.stack(rows)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("positions", ["compact", "original"])
class TestAnswers:
    def test_keeping_all_changes_no_bit(self, model, processor, batch, positions):
        inputs = encode(processor, batch)
        plain = model.generate(**inputs, **STEPS)
        with inject(model, build("none"), "full", positions):
            kept = model.generate(**inputs, **STEPS)
        assert torch.equal(kept.sequences, plain.sequences)
        assert torch.equal(logits(kept), logits(plain))

    def test_a_subset_equals_the_model_fed_only_that_subset(
        self, model, processor, batch, positions
    ):
        inputs = encode(processor, batch)
        rows = ((0, 3, 4, 9, 15), (1, 2, 7, 8, 11))[:batch]
        with inject(model, Fixed(rows), 5, positions):
            pruned = model.generate(**inputs, **STEPS)
        new = pruned.sequences[:, inputs["input_ids"].shape[1] :]
        want = reference(model, inputs, [list(row) for row in rows], new, positions)
        assert (logits(pruned) - want).abs().max() < 1e-4
        assert (
            logits(pruned) - logits(model.generate(**inputs, **STEPS))
        ).abs().max() > 0.1  # it does matter
        assert torch.equal(pruned.sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])

    def test_an_official_order_reaches_the_model(self, model, processor, batch, positions):
        inputs = encode(processor, batch)
        rows = ((9, 0, 15, 4), (2, 11, 1, 7))[:batch]
        with inject(model, Fixed(rows, custom_order=True), 4, positions):
            pruned = model.generate(**inputs, **STEPS)
        new = pruned.sequences[:, inputs["input_ids"].shape[1] :]
        want = reference(model, inputs, [list(row) for row in rows], new, positions)
        assert (logits(pruned) - want).abs().max() < 1e-4


@pytest.mark.parametrize("positions", ["compact", "original"])
def test_steps_by_hand_equal_generate(model, processor, positions):
    inputs = encode(processor, 2)
    with inject(model, build("uniform"), 5, positions), torch.no_grad():
        generated = model.generate(**inputs, **STEPS)
        output = model(**inputs, use_cache=True)
        steps = [output.logits[:, -1]]
        mask = inputs["attention_mask"]
        for token in generated.sequences[:, inputs["input_ids"].shape[1] : -1].T:
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            output = model(
                input_ids=token[:, None],
                attention_mask=mask,
                past_key_values=output.past_key_values,
                use_cache=True,
            )
            steps.append(output.logits[:, -1])
    assert (torch.stack(steps, 1) - logits(generated)).abs().max() < 1e-4


def test_the_library_needs_neither_hydra_nor_lmms_eval():
    code = (
        "import sys; from secateur.injection import inject; from secateur.pruners import build;"
        "found = {'hydra', 'lmms_eval', 'datasets', 'wandb', 'secateur.injection.selftest'};"
        "found &= sys.modules.keys();"
        "sys.exit(str(found) if found else 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_rows_of_a_batch_equal_the_rows_alone(model, processor):
    inputs = encode(processor, 3)
    with inject(model, build("scope"), 5):
        together = model.generate(**inputs, **STEPS)
        for row in range(3):
            alone = processor(
                text=[f"USER: <image>\n{QUESTIONS[row]} ASSISTANT:"],
                images=[picture(row)],
                return_tensors="pt",
            )
            one = model.generate(**alone, **STEPS)
            assert (logits(one)[0] - logits(together)[row]).abs().max() < 1e-4


def test_unequal_counts_in_a_batch_equal_the_rows_alone(model, processor):
    inputs = encode(processor, 2)
    rows = ((0, 3, 4, 9, 15), (1, 2, 7, 0, 0))
    with inject(model, Fixed(rows, counts=(5, 3)), 4) as trace:
        pruned = model.generate(**inputs, **STEPS)
    new = pruned.sequences[:, inputs["input_ids"].shape[1] :]
    want = reference(model, inputs, [[0, 3, 4, 9, 15], [1, 2, 7]], new, "compact")
    assert (logits(pruned) - want).abs().max() < 1e-4
    assert [record.kept_tokens for record in trace.audits] == [(5,), (3,)]


def test_the_plain_forward_is_pruned_too(model, processor):
    inputs = encode(processor, 1)
    with inject(model, Fixed(((2, 5),)), 2), torch.no_grad():
        output = model(**inputs)
    assert output.logits.shape[1] == inputs["input_ids"].shape[1] - N + 2


def test_several_images_in_a_prompt_are_pruned_each(model, processor):
    inputs = encode(processor, 1, images_each=3)
    with inject(model, build("fastervlm"), 4) as trace:
        model.generate(**inputs, **STEPS)
    (record,) = trace.audits
    assert record.visual_tokens == (N, N, N)
    assert record.kept_tokens == (4, 4, 4)
    assert record.prompt_tokens == int(inputs["attention_mask"].sum()) - 3 * (N - 4)


def test_a_prompt_without_image_passes_through(model, processor):
    inputs = processor(text=["USER: hello ASSISTANT:"], return_tensors="pt")
    plain = model.generate(**inputs, **STEPS)
    with inject(model, build("scope"), 4) as trace:
        pruned = model.generate(**inputs, **STEPS)
    assert torch.equal(logits(pruned), logits(plain))
    assert trace.audits[0].visual_tokens == ()


@pytest.mark.parametrize("name", ["random", "uniform", "fastervlm", "scope"])
def test_the_audit_equals_the_budget(model, processor, name):
    for budget, keep in ((1, 1), (5, 5), (N, N), ("25%", 4), (0.111, 2)):
        with inject(model, build(name), budget) as trace:
            model.generate(**encode(processor, 2), max_new_tokens=1)
        assert [record.kept_tokens for record in trace.audits] == [(keep,), (keep,)]
        assert all(len(record.kept_indices[0]) == keep for record in trace.audits)


def test_captures_equal_those_of_an_eager_tower(processor):
    model = tiny_model("llava", "sdpa")
    inputs = encode(processor, 2)
    seen = {}

    @dataclass(frozen=True)
    class Spy(Fixed):
        needs = frozenset(
            {
                "features",
                "saliency",
                "first_saliency",
                "encoder_features",
                "cls_token",
                "encoder_keys",
                "object_attention",
                "output_attention",
            }
        )

        def select(self, tokens: VisualTokens, keep: int) -> Selection:
            seen.update(tokens.tensors())
            return super().select(tokens, keep)

    with inject(model, Spy(((0,), (1,))), 1):
        model.generate(**inputs, max_new_tokens=1)
    model.model.vision_tower.set_attn_implementation("eager")
    with torch.no_grad():
        tower = model.model.vision_tower(
            inputs["pixel_values"], output_attentions=True, output_hidden_states=True
        )
    assert (seen["saliency"] - tower.attentions[-2][:, :, 0, 1:]).abs().max() < 1e-6
    assert (seen["first_saliency"] - tower.attentions[0][:, :, 0, 1:]).abs().max() < 1e-6
    for name, layer in (("object_attention", 1), ("output_attention", -2)):
        assert (seen[name] - tower.attentions[layer].mean((1, 2))[:, 1:]).abs().max() < 1e-6
    assert torch.allclose(seen["encoder_features"], tower.hidden_states[-2][:, 1:], atol=1e-5)
    assert torch.allclose(seen["cls_token"], tower.hidden_states[-2][:, 0], atol=1e-5)
    assert seen["encoder_keys"].shape == (2, 1 + N, 64)


@pytest.mark.parametrize("space", ["encoder", "projected"])
def test_replacement_features_reach_the_model(model, processor, space):
    """A pruner that returns the encoder's (or projector's) own rows equals one without features."""

    @dataclass(frozen=True)
    class Replacing(Fixed):
        needs = frozenset({"features", "encoder_features"})

        def select(self, tokens: VisualTokens, keep: int) -> Selection:
            index = torch.tensor(self.rows)
            source = tokens.encoder_features if space == "encoder" else tokens.features
            features = torch.stack([row[i] for row, i in zip(source, index, strict=True)])
            return Selection(torch.where(index == 0, EXTRA, index), features, space=space)

    inputs = encode(processor, 1)
    with inject(model, Fixed(((0, 3, 7),)), 3):
        plain = model.generate(**inputs, **STEPS)
    with inject(model, Replacing(((0, 3, 7),)), 3):
        replaced = model.generate(**inputs, **STEPS)
    assert (logits(plain) - logits(replaced)).abs().max() < 1e-4


def test_the_question_reaches_a_pruner_that_asks_for_it(model, processor):
    class Reads(Fixed):
        needs = frozenset({"features", "text_embeddings"})

        def select(self, tokens: VisualTokens, keep: int) -> Selection:
            shapes.append((tuple(tokens.text_embeddings.shape), tokens.text_mask.sum(1).tolist()))
            return super().select(tokens, keep)

    shapes: list = []
    inputs = encode(processor, 2)
    pruner = Reads(((0,), (1,)))
    with inject(model, pruner, 1) as trace:
        trace.announce([Sample("a", (7, 8, 9)), Sample("b", (5,))])
        model.generate(**inputs, max_new_tokens=1)
        with pytest.raises(ValueError, match="announce"):
            model.generate(**inputs, max_new_tokens=1)
    assert shapes == [((2, 3, 64), [3, 1])]


def hooks(model) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def test_nothing_is_left_behind(model, processor):
    inputs = encode(processor, 1)
    before, state = (
        model.generate(**inputs, **STEPS),
        {name: value.clone() for name, value in model.state_dict().items()},
    )
    count = hooks(model)
    with inject(model, build("scope"), 3):
        assert hooks(model) > count
        model.generate(**inputs, **STEPS)
    with pytest.raises(KeyboardInterrupt), inject(model, build("scope"), 3):
        raise KeyboardInterrupt
    assert hooks(model) == count
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert torch.equal(logits(model.generate(**inputs, **STEPS)), logits(before))


def test_an_encoder_of_the_models_own_is_put_back(model, processor, monkeypatch):
    inputs, calls, encoder = encode(processor, 1), [], model.model.get_image_features

    def own(pixel_values, **options):
        calls.append(options)
        return encoder(pixel_values, **options)

    monkeypatch.setattr(model.model, "get_image_features", own, raising=False)
    with inject(model, build("uniform"), 3):
        model.generate(**inputs, max_new_tokens=1)
    assert len(calls) == 1, "it is what encodes within the block"
    assert vars(model.model)["get_image_features"] is own
    with pytest.raises(KeyboardInterrupt), inject(model, build("uniform"), 3):
        raise KeyboardInterrupt
    assert vars(model.model)["get_image_features"] is own


@pytest.mark.parametrize("inner", [("scope", {}), ("fastv", {"layer": 1})])
def test_a_block_within_a_block_is_refused_and_the_outer_one_goes_on(model, processor, inner):
    inputs = encode(processor, 2)
    with inject(model, build("uniform"), 5):
        want = model.generate(**inputs, **STEPS)
    with inject(model, build("uniform"), 5) as trace:
        with (
            pytest.raises(ValueError, match="leave its block first"),
            inject(model, build(inner[0], **inner[1]), 3),
        ):
            pass
        assert torch.equal(logits(model.generate(**inputs, **STEPS)), logits(want))
    assert [record.kept_tokens for record in trace.audits] == [(5,), (5,)]
    with inject(model, build(inner[0], **inner[1]), 8):
        model.generate(**inputs, max_new_tokens=1)


@pytest.mark.parametrize(("name", "options"), [("scope", {}), ("fastv", {"layer": 1})])
def test_a_block_keeps_no_prompt_and_no_cache_alive(model, processor, name, options):
    inputs, seen = encode(processor, 2), []
    with inject(model, build(name, **options), 8):
        handle = model.model.language_model.layers[0].register_forward_pre_hook(
            lambda _module, args, kwargs: seen.append(
                weakref.ref(args[0] if args else kwargs["hidden_states"])
            ),
            with_kwargs=True,
        )
        output = model.generate(**inputs, **STEPS)
        handle.remove()
        seen.append(weakref.ref(output.past_key_values))
        del output
        gc.collect()
        assert [ref() for ref in seen] == [None] * 9


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (((0, 0, 1),), "more than once"),
        (((0, 1, N),), "outside 0..15"),
        (((-1, 0, 1),), "outside 0..15"),
        (((3, 2, 1),), "do not ascend"),
        (((0, 1),), "kept 2 tokens of 16; the budget is 3"),
    ],
)
def test_a_wrong_answer_of_a_pruner_reaches_the_caller(model, processor, rows, message):
    model.generate(
        **encode(processor, 1), max_new_tokens=1
    )  # transformers adds hooks of its own at the first call
    before = hooks(model)
    with inject(model, Fixed(rows), 3), pytest.raises(PrunerError, match=message):
        model.generate(**encode(processor, 1), max_new_tokens=1)
    assert hooks(model) == before


def test_settings_that_make_no_sense_are_errors(model, processor):
    for budget in (0, -3, "0%", "120%", "many", 17):
        with (
            pytest.raises(ValueError, match=str(budget).strip("%")),
            inject(model, build("scope"), budget),
        ):
            model.generate(**encode(processor, 1), max_new_tokens=1)
    with pytest.raises(ValueError, match="positions"), inject(model, build("scope"), 3, "absolute"):
        pass
    with (
        pytest.raises(
            ValueError, match=r"'scope' is no pruner: pass what secateur\.pruners\.build"
        ),
        inject(model, "scope", 3),
    ):
        pass
    with inject(model, build("none"), "full"), pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=torch.zeros(1, 4, 64))
