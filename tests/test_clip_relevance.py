"""Relevance in CLIP's space against the steps written out, on a tiny CLIP."""

import shutil

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from secateur.injection.clip import ClipRelevance
from secateur.pruners import VisualTokens, build
from secateur.pruners.relevance import clip_relevance

SEGMENT, WIDTH, JOINT = 77, 48, 24
LENGTHS = [3, 76, 77, 78, 79, 154, 155, 200]  # of questions in tokens, with start and end


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    letters = [chr(ord("a") + i) for i in range(26)]
    tokens = [
        "!",
        *letters,
        *(f"{letter}</w>" for letter in letters),
        "?</w>",
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])


def tiny_clip(tokenizer: CLIPTokenizer, end: int) -> CLIPModel:
    """A CLIP whose config names `end` as the end token; random weights, drawn wide."""
    sizes = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {"hidden_size": 32, "vocab_size": len(tokenizer), "eos_token_id": end}
    vision = sizes | {"hidden_size": WIDTH, "image_size": 56, "patch_size": 14}
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=JOINT)
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.fixture(scope="module")
def model(tokenizer) -> CLIPModel:
    return tiny_clip(tokenizer, tokenizer.eos_token_id)


@pytest.fixture(scope="module")
def clip(model, tokenizer) -> ClipRelevance:
    return ClipRelevance(model, tokenizer)


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    place = tmp_path_factory.mktemp("clip")
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def question_of(length: int) -> str:
    """One word of as many tokens, start and end counted: a letter is a token."""
    return "".join(chr(ord("a") + i * i % 26) for i in range(length - 2))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("legacy", [False, True], ids=["end", "legacy"])
def test_the_segments_of_a_question(tokenizer, length, legacy):
    """Cut, fill with zeros, encode and pool one segment after the other."""
    end = tokenizer.eos_token_id
    model = tiny_clip(tokenizer, 2 if legacy else end)
    ids = tokenizer(question_of(length))["input_ids"]
    assert len(ids) == length
    assert ids.count(end) == 1
    expected = []
    for start in range(0, length, SEGMENT):
        part = ids[start : start + SEGMENT]
        filled = part + [0] * (SEGMENT - len(part))
        mask = [1] * len(part) + [0] * (SEGMENT - len(part))
        pooled = max(filled) if legacy else end
        at = filled.index(pooled) if pooled in filled else 0
        with torch.no_grad():
            hidden = model.text_model(
                torch.tensor([filled]), attention_mask=torch.tensor([mask])
            ).last_hidden_state
            expected.append(hidden[0, at] @ model.text_projection.weight.T)
            embeds = model.get_text_features(
                torch.tensor([filled]), attention_mask=torch.tensor([mask])
            ).pooler_output
            torch.testing.assert_close(embeds[0], expected[-1])
    text = ClipRelevance(model, tokenizer).text(question_of(length))
    torch.testing.assert_close(text, torch.stack(expected))


def test_questions_differ_and_blank_ones_have_no_segment(clip):
    assert not torch.allclose(clip.text("is there a cat?"), clip.text("is there a dog?"), atol=1e-3)
    for blank in ("", " \n"):
        assert clip.text(blank).shape == (0, JOINT)


def test_a_question_is_encoded_once_a_device(clip, monkeypatch):
    calls, tower = [], clip.text_model.forward
    monkeypatch.setattr(
        clip.text_model, "forward", lambda **inputs: calls.append(inputs) or tower(**inputs)
    )
    first, again, other = (
        clip.text(question) for question in ("how many?", "how many?", "how many??")
    )
    assert len(calls) == 2
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert clip._remembered.cache_info().maxsize is not None


def test_patches_are_those_of_clips_own_modules(clip, model):
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    states = []

    def see(_block, _args, output):
        states.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(see) for block in model.vision_model.encoder.layers]
    with torch.no_grad():
        image = model.get_image_features(pixels).pooler_output
        expected = model.visual_projection(model.vision_model.post_layernorm(states[-2][:, 1:]))
    for handle in handles:
        handle.remove()
    patches = clip.patches(states[-2][:, 1:])
    assert patches.shape == (2, 16, JOINT)
    torch.testing.assert_close(patches, expected)
    # the last layer's CLS goes the way of the image embedding
    torch.testing.assert_close(clip.patches(states[-1][:, :1])[:, 0], image)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_models_dtype_does_not_reach_the_projections(clip, dtype):
    features = torch.randn(1, 4, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert clip.patches(features).dtype == torch.float32
    torch.testing.assert_close(
        clip.patches(features), clip.patches(features.float()), rtol=0, atol=0
    )


@pytest.mark.parametrize("pruner", ["cdpruner", "sppruner", "fsr"])
@pytest.mark.parametrize("length", [0, 10, 100])
def test_pruners_take_both(clip, pruner, length):
    generator = torch.Generator().manual_seed(3)
    encoded = torch.randn(2, 16, WIDTH, generator=generator)
    patches, text = clip.patches(encoded), clip.text(question_of(length) if length else "")
    tokens = VisualTokens(
        torch.randn(2, 16, 8, generator=generator),
        grid=(4, 4),
        encoder_features=encoded,
        saliency=torch.rand(2, 2, 16, generator=generator),
        clip_patches=patches,
        clip_text=text.expand(2, -1, -1),
    )
    expected = torch.zeros(2, 16)
    for segment in text:
        expected += torch.cosine_similarity(patches, segment, dim=-1) / len(text)
    torch.testing.assert_close(clip_relevance(tokens), expected)
    assert build(pruner).prune(tokens, 5).indices.shape == (2, 5)


def test_another_vision_tower_is_refused(clip):
    with pytest.raises(ValueError, match=r"tower is 64 wide, that of this CLIP 48"):
        clip.patches(torch.zeros(1, 4, 64))


def test_a_saved_checkpoint_loads_without_its_vision_tower(clip, folder):
    loaded = ClipRelevance.from_pretrained(str(folder))
    torch.testing.assert_close(loaded.text("what is this?"), clip.text("what is this?"))
    features = torch.randn(1, 4, WIDTH, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(loaded.patches(features), clip.patches(features))
    parts = {name.split(".")[0] for name in loaded.state_dict()}
    assert parts == {"text_model", "text_projection", "post_layernorm", "visual_projection"}


def test_half_precision_checkpoints_load_in_float32(tokenizer, tmp_path):
    tiny_clip(tokenizer, tokenizer.eos_token_id).half().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert {p.dtype for p in ClipRelevance.from_pretrained(str(tmp_path)).parameters()} == {
        torch.float32
    }


def test_a_checkpoint_that_is_nowhere():
    message = r"'nobody/clip'.*could not be loaded from the hub.*set model\.clip=/its/folder"
    with pytest.raises(FileNotFoundError, match=message):
        ClipRelevance.from_pretrained("nobody/clip")


@pytest.mark.parametrize(
    ("lost", "error", "message"),
    [
        ("model.safetensors", FileNotFoundError, "a file is missing or damaged"),
        (
            "tokenizer.json",
            ValueError,
            r"has 2 tokens, its text tower \d+: the tokenizer's files are missing",
        ),
    ],
)
def test_incomplete_folders(folder, tmp_path, lost, error, message):
    shutil.copytree(folder, tmp_path / "clip")
    (tmp_path / "clip" / lost).unlink()
    with pytest.raises(error, match=message):
        ClipRelevance.from_pretrained(str(tmp_path / "clip"))


def test_half_a_clip_is_refused(model, tokenizer, tmp_path):
    weights = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("text_projection")
    }
    model.save_pretrained(tmp_path, state_dict=weights)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"no complete CLIP: 1 weights are missing, text_projection\.weight"
    ):
        ClipRelevance.from_pretrained(str(tmp_path))
