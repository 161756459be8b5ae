"""Models without weights: the checkpoints' sizes, random models, processors that fit them."""

import pytest
import torch
from conftest import picture
from transformers import AutoModelForImageTextToText, AutoProcessor

from secateur.geometry import config_of, random_model, random_processor, reduced, tiny

# parameters of the hub checkpoints
SIZES = {
    "llava_1_5_7b": 7_063_427_072,
    "llava_1_5_13b": 13_351_494_656,
    "llava_next_7b": 7_063_431_168,  # and the newline's 4,096
    "llava_next_13b": 13_351_499_776,
    "llava_onevision_0_5b": 893_675_552,
    "llava_onevision_7b": 8_030_807_584,
    "qwen2_vl_7b": 8_291_375_616,
    "qwen2_5_vl_7b": 8_292_166_656,
    "qwen2_5_vl_3b": 3_754_622_976,
    "qwen3_vl_2b": 2_127_532_032,
    "qwen3_vl_4b": 4_437_815_808,
    "qwen3_vl_8b": 8_767_123_696,
    "internvl3_1b": 938_193_024,
    "internvl3_2b": 2_088_957_440,
    "internvl3_8b": 7_944_373_760,
}
FAMILIES = [
    *("llava", "llava_next", "llava_next_fixed"),
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"),
]


def small(family: str):
    """A tiny configuration; `tied` is the Qwen one with one matrix for embeddings and head."""
    config = tiny("qwen2_5_vl" if family == "tied" else family)
    if family == "tied":
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    return config


def prompt(config, pictures: int = 1):
    processor = random_processor(config)
    content = [{"type": "image"}] * pictures + [{"type": "text", "text": "what is this?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return processor(
        text=[text], images=[picture(seed) for seed in range(pictures)], return_tensors="pt"
    )


@pytest.mark.parametrize("name", SIZES)
def test_a_geometry_has_the_size_of_its_checkpoint(name):
    model = random_model(config_of(name), "meta", torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == SIZES[name]
    assert (
        len(random_processor(config_of(name)).tokenizer) == config_of(name).text_config.vocab_size
    )


@torch.no_grad()
@pytest.mark.parametrize("family", [*FAMILIES, "tied"])
def test_a_drawn_model_is_an_ordinary_one_with_other_weights(family):
    config = small(family)
    drawn, ordinary = (
        random_model(config, std=0.2),
        AutoModelForImageTextToText.from_config(config).eval(),
    )
    buffers = dict(ordinary.named_buffers())
    assert [name for name, _ in drawn.named_buffers()] == list(buffers)
    for name, buffer in drawn.named_buffers():
        assert buffer.dtype == buffers[name].dtype
        assert torch.equal(buffer, buffers[name]), name
    ordinary.load_state_dict(drawn.state_dict())
    inputs = prompt(config)
    logits = drawn(**inputs).logits
    assert torch.isfinite(logits).all()
    assert torch.equal(logits, ordinary(**inputs).logits)
    assert (drawn.lm_head.weight is drawn.get_input_embeddings().weight) == (family == "tied")


def test_the_buffers_keep_their_precision_in_bfloat16():
    dtypes = {
        name: buffer.dtype
        for name, buffer in random_model(tiny("llava"), dtype=torch.bfloat16).named_buffers()
    }
    assert {name: dtype for name, dtype in dtypes.items() if "inv_freq" in name}
    assert set(dtypes.values()) == {torch.float32, torch.int64}


def test_the_seed_decides_the_weights_and_the_callers_generator_is_left_alone():
    state, draw = (
        torch.get_rng_state(),
        [random_model(tiny("llava"), seed=seed) for seed in (0, 0, 1)],
    )
    assert torch.equal(torch.get_rng_state(), state)
    one, same, other = (torch.cat([p.flatten() for p in model.parameters()]) for model in draw)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    weight = draw[0].model.language_model.layers[0].mlp.up_proj.weight
    assert abs(weight.std().item() - 0.02) < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_processor_and_model_fit_through_a_saved_folder(family, tmp_path):
    config = tiny(family)
    random_model(config, std=0.2).save_pretrained(tmp_path)
    random_processor(config).save_pretrained(tmp_path)
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    )
    inputs = prompt(config, pictures=2)
    count = int((inputs["input_ids"] == config.image_token_id).sum())
    # 48 x 64 px: 16 tokens and, without padding, 4 rows of 6 (two crops) or 6 rows of 8 (four
    # crops), each with a newline; Qwen resizes to 56 x 56; InternVL cuts 3 x 4 tiles
    tokens = {"llava": 16, "llava_next": 16 + 4 * 7, "llava_next_fixed": 16 + 6 * 9}
    tokens["internvl"] = (12 + 1) * 16
    assert count == 2 * tokens.get(family, 4)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=8, min_new_tokens=8)
    text = processor.tokenizer.decode(
        output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    assert text
    again = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert not set(again) & set(processor.tokenizer.all_special_ids)
    assert processor.tokenizer.decode(
        processor.tokenizer("Grün, 3 × 4?\n", add_special_tokens=False)["input_ids"]
    ) == ("Grün, 3 × 4?\n")
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id


@torch.no_grad()
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llava_next_fixed"])
def test_a_reduced_model_runs_with_the_tokens_of_the_whole_one(family):
    config = tiny(family)
    less = reduced(config, layers=2, shrink=2)
    assert config.text_config.num_hidden_layers == 4  # a copy
    assert less.text_config.hidden_size == 32
    inputs = prompt(config)
    model = random_model(less)
    assert len(model.model.language_model.layers) == 2
    assert torch.isfinite(model(**inputs).logits).all()


def test_a_reduced_checkpoint_keeps_the_width_of_a_head():
    config = reduced(config_of("qwen2_5_vl_7b"), layers=12, shrink=4)
    text, vision = config.text_config, config.vision_config
    assert text.hidden_size // text.num_attention_heads == 128
    assert (text.num_attention_heads, text.num_key_value_heads) == (7, 1)
    assert vision.hidden_size // vision.num_heads == 80
    assert vision.fullatt_block_indexes == [3, 11]
    assert reduced(config_of("qwen2_5_vl_7b"), 32).vision_config.fullatt_block_indexes == [
        7,
        15,
        23,
        31,
    ]


def test_reducing_qwen2_vl_keeps_the_towers_width_apart_from_the_language_models():
    config = reduced(config_of("qwen2_vl_7b"), layers=12, shrink=4)
    text, vision = config.text_config, config.vision_config
    assert (text.num_attention_heads, text.num_key_value_heads) == (7, 1)
    assert (vision.embed_dim, vision.num_heads, vision.depth) == (320, 4, 12)
    assert vision.hidden_size == text.hidden_size == 896
    assert len(text.layer_types) == 12


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: config_of("llava_1_6"), "known: llava_1_5_7b"),
        (lambda: tiny("blip"), "known: llava, "),
        (lambda: reduced(tiny("llava"), 1), "at least 2"),
        (lambda: reduced(tiny("llava"), 2, shrink=3), "does not divide the 4 heads"),
    ],
)
def test_errors_name_the_way_out(call, says):
    with pytest.raises(ValueError, match=says):
        call()
