"""Ways to call a model inside a block of `inject`: docs/SUPPORT.md has a row for each of them."""

import ast
import copy
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
from conftest import picture, tiny_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from test_inject import Fixed, encode
from transformers import StaticCache, pipeline

from scripts.gpu_check import TOLERANCE
from secateur.injection import Sample, inject
from secateur.pruners import build

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "SUPPORT.md"
KEPT = ((0, 3, 4, 9, 15), (1, 2, 7, 8, 11))
STEPS = {"max_new_tokens": 8, "min_new_tokens": 8}


@pytest.fixture(scope="module")
def model():
    return tiny_model("llava", "sdpa")


@torch.no_grad()
def subset(model, inputs, kept=KEPT) -> dict[str, torch.Tensor]:
    """Embeddings and mask of the text and of the kept tokens alone, padded on the left."""
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    visual = ids == model.config.image_token_id
    features = torch.cat(model.model.get_image_features(inputs["pixel_values"]).pooler_output)
    embeds = model.get_input_embeddings()(ids).masked_scatter(visual[..., None], features)
    rows = []
    for row, indices in enumerate(kept):
        stays = real[row] & ~visual[row]
        stays[visual[row].nonzero()[:, 0][list(indices)]] = True
        rows.append(embeds[row, stays])
    pad = torch.nn.utils.rnn.pad_sequence
    ones = [torch.ones(len(row), dtype=torch.long) for row in rows]
    return {
        "inputs_embeds": pad(rows, batch_first=True, padding_side="left"),
        "attention_mask": pad(ones, batch_first=True, padding_side="left"),
    }


def check_generate(model, inputs, caller=None, kept=KEPT, **options) -> None:
    """`generate` of the pruned model gives the tokens it gives for the subset, and these differ
    from those of the unpruned model."""
    caller, length = caller or model, inputs["input_ids"].shape[1]
    torch.manual_seed(0)
    expected = model.generate(**subset(model, inputs, kept), **STEPS, **options)
    torch.manual_seed(0)
    with inject(model, Fixed(tuple(row for row in kept if row)), 5):
        pruned = caller.generate(**inputs, **STEPS, **options)[:, length:]
    torch.manual_seed(0)
    unpruned = caller.generate(**inputs, **STEPS, **options)[:, length:]
    assert torch.equal(pruned, expected)
    assert not torch.equal(pruned, unpruned)


class TestDecoding:
    def test_greedy(self, model, processor):
        check_generate(model, encode(processor, 2), do_sample=False)

    def test_sampling(self, model, processor):
        check_generate(model, encode(processor, 2), do_sample=True, temperature=0.7, top_k=20)

    @pytest.mark.parametrize("pruner", [build("uniform"), build("scope")])
    def test_assisted_decoding(self, model, processor, pruner):
        """The assistant is not pruned, so that some of the tokens it proposes are rejected."""
        inputs, assistant = encode(processor, 1), copy.deepcopy(model)
        options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        with inject(model, pruner, 5):
            expected = model.generate(**inputs, **STEPS, **options)
            found = model.generate(**inputs, **STEPS, **options, assistant_model=assistant)
        proposed = assistant.generate(**inputs, **STEPS, **options)
        assert not torch.equal(proposed.sequences, expected.sequences)
        assert torch.equal(found.sequences, expected.sequences)
        assert (torch.cat(found.logits) - torch.cat(expected.logits)).abs().max() < 1e-4

    @pytest.mark.parametrize(
        "options",
        [
            {"do_sample": False, "num_beams": 2},
            {"do_sample": False, "num_beams": 2, "num_return_sequences": 2},
            {"do_sample": True, "num_return_sequences": 2},
        ],
    )
    @pytest.mark.parametrize("pruner", [build("uniform"), build("fastv", layer=1)])
    def test_several_sequences_per_prompt_are_refused(self, model, processor, pruner, options):
        with inject(model, pruner, 8), pytest.raises(ValueError, match="beam search, or several"):
            model.generate(**encode(processor, 2), **STEPS, **options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"use_cache": False}, "use_cache=False"),
            ({"cache_implementation": "static"}, "cache_implementation='static'"),
            ({"prefill_chunk_size": 16}, "prefill_chunk_size"),
        ],
    )
    @pytest.mark.parametrize("pruner", [build("uniform"), build("fastv", layer=1)])
    def test_other_caches_are_refused(self, model, processor, pruner, options, message):
        """Before the first token, whether by keyword or by a generation config."""
        inputs, config = encode(processor, 2), copy.deepcopy(model.generation_config)
        config.update(**options)
        with inject(model, pruner, 8):
            with pytest.raises(ValueError, match=message):
                model.generate(**inputs, max_new_tokens=1, **options)
            with pytest.raises(ValueError, match=message):
                model.generate(**inputs, max_new_tokens=1, generation_config=config)

    def test_a_static_cache_object_is_refused(self, model, processor):
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
        with inject(model, build("uniform"), 8), pytest.raises(ValueError, match="with a static"):
            model(**encode(processor, 1), past_key_values=cache)

    @pytest.mark.parametrize("name", ["assistant_model", "prompt_lookup_num_tokens"])
    def test_assisted_decoding_inside_the_language_model_is_refused(self, model, processor, name):
        options = {name: model if name == "assistant_model" else 2}
        for pruner in (build("fastv", layer=1), build("pyramiddrop", stages=(1,))):
            with inject(model, pruner, 8), pytest.raises(ValueError, match=name):
                model.generate(**encode(processor, 1), **STEPS, **options)

    def test_continuous_batching_is_refused(self, model, processor):
        ids = encode(processor, 1)["input_ids"].tolist()
        with inject(model, build("uniform"), 8), pytest.raises(ValueError, match="generate_batch"):
            model.generate_batch(ids)

    def test_labels_are_refused(self, model, processor):
        inputs = encode(processor, 1)
        with inject(model, build("uniform"), 8), pytest.raises(ValueError, match="labels have the"):
            model(**inputs, labels=inputs["input_ids"])


class TestTurns:
    def test_a_whole_conversation_is_a_new_prompt(self, model, processor):
        inputs, more = encode(processor, 1), torch.tensor([[20, 21, 22]])
        with inject(model, Fixed(KEPT[:1]), 5):
            first = model.generate(**inputs, **STEPS, do_sample=False)
        ids = torch.cat([first, more], 1)
        both = dict(inputs) | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        check_generate(model, both, kept=KEPT[:1], do_sample=False)

    def test_a_second_image_after_a_filled_cache_is_refused(self, model, processor):
        inputs = encode(processor, 1)
        with inject(model, build("uniform"), 5):
            first = model.generate(**inputs, **STEPS, return_dict_in_generate=True)
            ids = torch.cat([first.sequences, inputs["input_ids"]], 1)
            second = dict(inputs) | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with pytest.raises(ValueError, match="A second turn cannot go on"):
                model.generate(**second, **STEPS, past_key_values=first.past_key_values)
            with pytest.raises(ValueError, match="in one piece"):
                model(**inputs | {"attention_mask": None}, past_key_values=first.past_key_values)

    @pytest.mark.parametrize("pruner", [build("uniform"), build("fastv", layer=1)])
    def test_a_second_turn_with_the_cache_of_the_first_is_refused(self, model, processor, pruner):
        inputs, more = encode(processor, 1), torch.tensor([[20, 21, 22]])
        with inject(model, pruner, 8):
            first = model.generate(**inputs, **STEPS, return_dict_in_generate=True)
            ids = torch.cat([first.sequences, more], 1)
            second = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            with pytest.raises(ValueError, match="A second turn cannot go on"):
                model.generate(**second, **STEPS, past_key_values=first.past_key_values)


class TestInputs:
    def test_question_ids_of_two_axes_are_refused(self, model, processor):
        ids = torch.tensor([[20, 21, 22]])
        with inject(model, build("trimtokenator"), 5) as trace:
            trace.announce([Sample("0", ids)])
            with pytest.raises(
                ValueError, match=r"question_ids of sample '0' have the shape \(1, 3"
            ):
                model(**encode(processor, 1))

    def test_a_batch_with_a_row_of_text_alone(self, model, processor):
        texts = ["USER: <image>\nwhat? ASSISTANT:", "USER: hello there ASSISTANT:"]
        inputs = processor(text=texts, images=[picture(0)], padding=True, return_tensors="pt")
        check_generate(model, inputs, kept=(KEPT[0], ()), do_sample=False)

    @pytest.mark.parametrize(("pruner", "budget"), [(Fixed(KEPT), 5), (build("fastv", layer=1), 8)])
    def test_the_forward_takes_padding_on_either_side(self, model, processor, pruner, budget):
        left, other = encode(processor, 2), copy.deepcopy(processor)
        other.tokenizer.padding_side = "right"
        right = encode(other, 2)
        with inject(model, pruner, budget), torch.no_grad():
            expected = model(**left).logits[:, -1]
            found = model(**right).logits
        padding = (right["attention_mask"] == 0).sum(1)
        assert padding.tolist() == [0, 17]
        if isinstance(pruner, Fixed):  # methods before the LLM move the padding to the left
            padding = torch.zeros_like(padding)
        last = found[torch.arange(2), found.shape[1] - 1 - padding]
        assert (last - expected).abs().max() < 1e-4


class TestWrappers:
    def test_a_pipeline(self, model, processor):
        text = "USER: <image>\nwhat is this, and why? ASSISTANT:"
        options = {"max_new_tokens": 8, "do_sample": False}
        answer = pipeline("image-text-to-text", model=model, processor=processor)
        inputs = processor(text=[text], images=[picture(0)], return_tensors="pt")
        with inject(model, build("uniform"), 5):
            new = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
            (found,) = answer(text=text, images=[picture(0)], generate_kwargs=options)
        assert found["generated_text"] == text + processor.decode(new[0])

    def test_a_peft_model(self, model, processor):
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        adapted = get_peft_model(copy.deepcopy(model), lora).eval()
        inputs = encode(processor, 2)
        plain = subset(adapted.get_base_model(), inputs)
        expected = adapted.generate(**plain, **STEPS, do_sample=False)
        with inject(adapted, Fixed(KEPT), 5):
            found = adapted.generate(**inputs, **STEPS, do_sample=False)
        assert torch.equal(found[:, inputs["input_ids"].shape[1] :], expected)
        check_generate(adapted.get_base_model(), inputs, caller=adapted, do_sample=False)

    def test_peft_methods_that_add_tokens_are_refused(self, model):
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
        tuned = SimpleNamespace(get_base_model=lambda: model, active_peft_config=config)
        with (
            pytest.raises(ValueError, match="adds tokens of its own"),
            inject(tuned, build("uniform"), 5),
        ):
            pass

    def test_other_wrappers_are_refused(self, model):
        for wrapped in (torch.nn.DataParallel(model), torch.compile(model)):
            with (
                pytest.raises(ValueError, match="Pass the model itself, without a wrapper"),
                inject(wrapped, build("uniform"), 5),
            ):
                pass

    @pytest.mark.parametrize("part", ["", "model.language_model", "lm_head"])
    @pytest.mark.parametrize("in_place", [False, True])
    def test_compiled_models_are_refused(self, model, part, in_place):
        compiled = copy.deepcopy(model)
        module = compiled.get_submodule(part)
        if in_place:
            module.compile()
        else:
            module.forward = torch.compile(module.forward)
        with (
            pytest.raises(ValueError, match=f"^{part or type(model).__name__} was compiled"),
            inject(compiled, build("uniform"), 5),
        ):
            pass

    def test_the_model_is_as_before(self, model):
        before = dict(vars(model)), dict(model._forward_pre_hooks)
        with inject(model, build("uniform"), 5):
            assert "generate" in vars(model)
        assert (vars(model).keys(), model._forward_pre_hooks) == (before[0].keys(), before[1])

    def test_weights_offloaded_by_accelerate(self, model, processor):
        moved = accelerate.cpu_offload(copy.deepcopy(model), torch.device("cpu"))
        inputs = encode(processor, 2)
        for pruner, budget in ((Fixed(KEPT), 5), (build("fastv", layer=1), 8)):
            with inject(model, pruner, budget):
                expected = model.generate(**inputs, **STEPS, do_sample=False)
            with inject(moved, pruner, budget):
                found = moved.generate(**inputs, **STEPS, do_sample=False)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes_on_a_cpu(model, processor, dtype):
    """The tolerance is a share of the largest logit; pruning moves the logits by more."""
    converted, inputs = copy.deepcopy(model).to(getattr(torch, dtype)), encode(processor, 2)
    inputs["pixel_values"] = inputs["pixel_values"].to(getattr(torch, dtype))
    with torch.no_grad():
        expected = converted(**subset(converted, inputs)).logits[:, -1]
        unpruned = converted(**inputs).logits[:, -1]
        with inject(converted, Fixed(KEPT), 5):
            pruned = converted(**inputs).logits[:, -1]
    tolerance = TOLERANCE[dtype] * expected.abs().max()
    assert (pruned - expected).abs().max() <= tolerance
    assert (pruned - unpruned).abs().max() > tolerance


def names_of_tests(file: Path) -> set[str]:
    """Names of the tests of a file, those of classes as `Class::test`."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        before = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        names |= {before + item.name for item in inner if isinstance(item, ast.FunctionDef)}
    return {name for name in names if name.rpartition("::")[2].startswith("test_")}


def test_every_row_of_the_page_names_a_test_or_says_untested():
    rows = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in PAGE.read_text().splitlines()
        if line.startswith("| ") and not line.startswith("| what ")
    ]
    assert len(rows) > 20
    for what, status, where, _ in rows:
        if status.startswith("untested"):
            assert where == "-", what
            continue
        assert status in ("supported", "refused"), what
        file, _, name = where.strip("`").partition("::")
        assert name in names_of_tests(ROOT / "tests" / file), f"{what}: no test {where}"
    named = {where.strip("`").partition("::")[2] for _, _, where, _ in rows}
    here = names_of_tests(Path(__file__)) - {
        "test_every_row_of_the_page_names_a_test_or_says_untested",
        "TestWrappers::test_the_model_is_as_before",
    }
    assert here <= named
