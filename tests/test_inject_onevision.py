"""LLaVA-OneVision on a tiny real model: the whole image, and its tiles as one mosaic."""

import functools
import inspect
from dataclasses import dataclass, field

import pytest
import torch
from test_inject import QUESTIONS, STEPS, Fixed, logits
from test_inject_layers import prompts
from test_inject_layers import reference as by_layers
from test_inject_qwen import scene
from torch import Tensor
from torch.nn.functional import interpolate

from secateur.geometry import random_model, random_processor, reduced, tiny
from secateur.injection import inject
from secateur.inputs import Inputs, Prompt
from secateur.pruners import Pruner, PrunerError, Selection, VisualTokens, build

N, SIDE = 16, 4  # tokens of a crop
# width, height: 2 x 2 tiles with padding; 4 x 4 tiles, resampled; 1 x 2 tiles; tiles that are all
# padding, of which newlines remain
SIZES = [(100, 70), (220, 215), (112, 56), (1, 150)]
CASES = {
    "one": [[0]],
    "resampled": [[1]],
    "narrow": [[3]],
    "two rows": [[0], [1]],
    "two images": [[0, 2]],
    "two images and one": [[0, 2], [1]],
    "text and one": [[], [0]],
}


@functools.cache
def setting(attention: str):
    config = tiny("llava_onevision")
    model = random_model(config, attn_implementation=attention, std=0.2)
    return model, Inputs(random_processor(config), model.config)


@pytest.fixture
def model(attention):
    return setting(attention)[0]


def encode(rows: list[list[int]], first: int = 0):
    """One prompt per list of image numbers; `first` counts the questions."""
    inputs = setting("sdpa")[1]
    texts = [
        f"look {'<image>, ' * len(row)}{q}" for row, q in zip(rows, QUESTIONS[first:], strict=False)
    ]
    images = [[scene(SIZES[number], number) for number in row] for row in rows]
    return inputs.collate([inputs(Prompt(*one, "")) for one in zip(texts, images, strict=True)])


def staying(audit, places: Tensor) -> Tensor:
    """[L] the positions that remain, by an audit: text, kept tokens, newlines of rows with some.

    Args:
        places: [L] True at the placeholders of the prompt.
    """
    stays = []
    for kept in map(set, audit.kept_indices):
        stays += [token in kept for token in range(N)]
        if len(audit.sections) < 2:  # the newlines after whole images always stay
            stays += [True] * (int(places.sum()) // len(audit.kept_indices) - N)
            continue
        rows, columns = audit.sections[1]
        for row in range(rows):
            line = [N + row * columns + column in kept for column in range(columns)]
            stays += [*line, any(line)]
    remains = ~places
    remains[places] = torch.tensor(stays, dtype=torch.bool)
    return remains


@torch.no_grad()
def reference(model, embeds: Tensor, stays: Tensor, new: Tensor, positions: str) -> Tensor:
    """Logits of the language model on the positions that stay, without cache or hooks."""
    sequence = torch.cat([embeds[stays], model.get_input_embeddings()(new[:-1])])[None]
    place = torch.arange(len(embeds) + len(new) - 1)
    if positions == "original":
        place = place[torch.cat([stays, torch.ones(len(new) - 1, dtype=torch.bool)])]
    hidden = model.model.language_model(
        inputs_embeds=sequence,
        position_ids=place[None, : sequence.shape[1]],
        attention_mask=torch.ones(sequence.shape[:2], dtype=torch.long),
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[0, -len(new) :])


@pytest.mark.parametrize("case", CASES)
class TestAnswers:
    def test_keeping_all_changes_no_bit(self, model, case):
        inputs = encode(CASES[case])
        plain = model.generate(**inputs, **STEPS)
        for pruner in (build("none"), build("visionzip", keep_cls=False)):
            with inject(model, pruner, "full"):
                kept = model.generate(**inputs, **STEPS)
            assert torch.equal(logits(kept), logits(plain))

    @pytest.mark.parametrize("positions", ["compact", "original"])
    def test_a_subset_equals_the_model_fed_only_that_subset(self, model, case, positions):
        inputs = encode(CASES[case])
        with inject(model, build("random"), "30%", positions) as trace:
            pruned = model.generate(**inputs, **STEPS)
        new = pruned.sequences[:, inputs["input_ids"].shape[1] :]
        for row, (embeds, places) in enumerate(prompts(model, inputs)):
            stays = staying(trace.audits[row], places)
            want = reference(model, embeds, stays, new[row], positions)
            assert (logits(pruned)[row] - want).abs().max() < 1e-4
            assert trace.audits[row].prompt_tokens == int(stays.sum())
        plain = model.generate(**inputs, **STEPS)
        assert (logits(pruned) - logits(plain)).abs().max() > 0.1  # it does matter


@pytest.mark.parametrize("case", ["two rows", "two images and one"])
def test_rows_of_a_batch_equal_the_rows_alone(model, case):
    with inject(model, build("scope"), "30%") as trace:
        together = model.generate(**encode(CASES[case]), **STEPS)
        for row, images in enumerate(CASES[case]):
            one = model.generate(**encode([images], first=row), **STEPS)
            assert (logits(one)[0] - logits(together)[row]).abs().max() < 1e-4
            assert trace.audits[-1].kept_indices == trace.audits[row].kept_indices


@pytest.mark.parametrize("case", ["two rows", "two images and one"])
def test_images_encoded_before_generate(model, case):
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this release of transformers takes no encoded images")
    inputs = dict(encode(CASES[case]))
    names = ("pixel_values", "image_sizes", "batch_num_images")
    with inject(model, build("uniform"), "30%"), torch.no_grad():
        want = model.generate(**inputs, **STEPS)
        images = {name: inputs.pop(name) for name in names}
        output = model.get_image_features(**images, return_dict=True)
        got = model.generate(**inputs, mm_encoder_outputs={"image": output}, **STEPS)
    assert torch.equal(logits(got), logits(want))


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("case", ["one", "resampled", "two images"])
def test_fastv_equals_the_reference_layer_by_layer(case, layer):
    model, inputs = setting("eager")[0], encode(CASES[case])
    pruner = build("fastv", layer=layer, budget="after")
    with inject(model, pruner, "30%") as trace:
        pruned = model.generate(**inputs, **STEPS)
    new = pruned.sequences[:, inputs["input_ids"].shape[1] :]
    (kept,) = {audit.layer_tokens[-1] for audit in trace.audits}
    want, _ = by_layers(model, prompts(model, inputs), pruner, kept, new)
    assert (logits(pruned) - want).abs().max() < 1e-4
    with inject(model, pruner, "full"):
        whole = model.generate(**inputs, **STEPS)
    assert torch.equal(logits(whole), logits(model.generate(**inputs, **STEPS)))


@dataclass(frozen=True)
class Looking(Fixed):
    """Keeps the first token of everything that it is shown, and remembers that."""

    rows: tuple[tuple[int, ...], ...] = ((0,),)
    seen: list[VisualTokens] = field(default_factory=list)

    needs = frozenset(
        {"features", "encoder_features", "encoder_keys", "saliency", "grid"}
        | {"output_attention", "object_attention"}
    )

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        self.seen.append(tokens)
        return super().select(tokens, keep)


def laid_out(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """[tiles, N, C] -> [rows SIDE, columns SIDE, C] as the tiles lie in the image."""
    grid = tiles.view(rows, columns, SIDE, SIDE, -1).permute(0, 2, 1, 3, 4)
    return grid.reshape(rows * SIDE, columns * SIDE, -1)


@torch.no_grad()
@pytest.mark.parametrize(("image", "tiles"), [(0, (2, 2)), (1, (4, 4))])
def test_captures_of_the_mosaic_are_laid_out_cut_and_resampled_as_its_features(image, tiles):
    """Against an eager tower, with the mosaic made by hand."""
    model, inputs, pruner = setting("eager")[0], encode([[image]]), Looking()
    with inject(model, pruner, 2):
        model.generate(**inputs, max_new_tokens=1)
    base, mosaic = pruner.seen
    core, pixels = model.model, inputs["pixel_values"][0]
    tower = core.vision_tower(pixels, output_attentions=True, output_hidden_states=True)
    received = {n: tower.attentions[n].mean(2).transpose(1, 2) for n in (1, -1)}  # [R, N, H]
    hidden = tower.hidden_states[-1]  # before the tower's last norm
    made = {
        "features": core.multi_modal_projector(hidden),
        "encoder_features": hidden,
        "saliency": received[-1],
        "output_attention": received[-1].mean(-1, keepdim=True),
        "object_attention": received[1].mean(-1, keepdim=True),
    }
    for name, value in made.items():
        whole = laid_out(value[1:], *tiles)
        if image == 0:  # 100 x 70 pixels in 112 x 112: of 8 rows of tokens 2 are padding
            want = whole[1:-1]
        else:  # 220 x 215 in 224 x 224, by 16/12 in both directions
            want = interpolate(whole.permute(2, 0, 1)[None], [12, 12], mode="bilinear")
            want = want[0].permute(1, 2, 0)
        got = getattr(mosaic, name)[0]
        got = got.T if name == "saliency" else got.reshape(len(got), -1) if got.dim() == 1 else got
        assert mosaic.grid == want.shape[:2]
        assert torch.allclose(got, want.flatten(0, 1), atol=1e-5), name
        got = getattr(base, name)[0]
        got = got.T if name == "saliency" else got.reshape(len(got), -1) if got.dim() == 1 else got
        assert base.grid == (SIDE, SIDE)
        assert torch.allclose(got, value[0], atol=1e-5), name
    assert mosaic.encoder_keys.shape == (1, mosaic.shape[1], 32)


@dataclass(frozen=True)
class Three(Pruner):
    """Keeps three tokens of every section; `handed` returns the encoder's features of them too."""

    handed: bool = False

    name = "three"
    paper = "-"
    status = "baseline"
    adaptive = True
    needs = frozenset({"features", "encoder_features"})
    merges = property(lambda self: self.handed)  # type: ignore[assignment]

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        index = [0, 3, 7]
        features = tokens.encoder_features[:, index] if self.handed else None
        return Selection(torch.tensor(index).expand(tokens.shape[0], -1), features, "encoder")


@pytest.mark.parametrize("case", ["one", "resampled", "two images"])
def test_what_merges_encoder_features_gets_projected_ones(model, case):
    """Rows that are handed on unchanged are the model's own tokens, resampled or not."""
    answers = []
    for pruner in (Three(), Three(handed=True)):
        with inject(model, pruner, "30%"):
            answers.append(logits(model.generate(**encode(CASES[case]), **STEPS)))
    assert torch.equal(*answers)


def test_features_of_the_encoder_from_a_method_that_does_not_merge_are_an_error(model):
    class Wrong(Three):
        merges = False

    with (
        inject(model, Wrong(handed=True), "30%"),
        pytest.raises(PrunerError, match="merges = True"),
    ):
        model.generate(**encode([[0]]), **STEPS)


def test_a_budget_is_divided_in_proportion(model):
    with inject(model, build("fastervlm"), 15) as trace:
        model.generate(**encode(CASES["one"]), max_new_tokens=1)
    (audit,) = trace.audits
    assert audit.sections == ((4, 4), (6, 8))
    assert audit.crops == ((4, 4),) * 5
    kept = [index for index in audit.kept_indices[0] if index >= 0]
    assert [sum(index < N for index in kept), sum(index >= N for index in kept)] == [4, 11]


def test_a_reduced_model_is_pruned():
    config = reduced(tiny("llava_onevision"), layers=2, shrink=2)
    model = random_model(config)
    assert len(model.model.language_model.layers) == len(config.text_config.layer_types) == 2
    with inject(model, build("scope"), "50%") as trace:
        model.generate(**encode([[1]]), max_new_tokens=1)
    assert trace.audits[0].sections == ((4, 4), (12, 12))


class TestRefusals:
    def given(self, images, texts=("look <image>, <image>, why?",)):
        processor = setting("sdpa")[1].processor
        return processor(text=list(texts), images=images, padding=True, return_tensors="pt")

    @pytest.mark.parametrize("method", [("scope", {}), ("fastv", {"layer": 1})])
    def test_a_flat_list_of_images_is_told(self, model, method):
        inputs = self.given([scene(SIZES[0]), scene(SIZES[2])])
        with inject(model, build(method[0], **method[1]), "50%"):
            with pytest.raises(ValueError, match=r"has 2 images, encoded in tiles: .* nested"):
                model.generate(**inputs, **STEPS)
            inputs = self.given([[scene(SIZES[0]), scene(SIZES[2])]])
            model.generate(**inputs, **STEPS)

    def test_images_of_two_prompts_in_one_list_are_told(self, model):
        images = [[scene(SIZES[0]), scene(SIZES[2])]]
        try:
            inputs = self.given(images, ["<image> a?", "<image> b?"])
        except StopIteration:
            pytest.skip("the processor of this release fails by itself")
        with (
            inject(model, build("scope"), "50%"),
            pytest.raises(ValueError, match=r"has 1 image, encoded whole: .* nested"),
        ):
            model.generate(**inputs, **STEPS)

    @pytest.mark.parametrize("budget", ["8/tile", "50%/tile"])
    def test_a_budget_per_tile(self, model, budget):
        with (
            pytest.raises(ValueError, match=f"budget={budget}: .* no tile has a budget of its own"),
            inject(model, build("scope"), budget),
        ):
            pass

    @pytest.mark.parametrize(
        ("name", "value", "known"),
        [
            ("vision_feature_layer", -2, "-1"),
            ("vision_feature_layer", [-1, -2], "-1"),
            ("vision_feature_select_strategy", "default", "'full'"),
            ("vision_config.model_type", "clip_vision_model", "'siglip_vision_model'"),
            ("text_config.model_type", "llama", "'qwen2'"),
        ],
    )
    def test_other_options_of_a_checkpoint(self, monkeypatch, name, value, known):
        model = setting("sdpa")[0]
        part, _, last = name.rpartition(".")
        owner = getattr(model.config, part) if part else model.config
        # not by setattr: configs check values
        monkeypatch.setitem(vars(owner), last, value)
        with (
            pytest.raises(ValueError, match=rf"has {name}=.*; pruning supports {known} alone"),
            inject(model, build("uniform"), "50%"),
        ):
            pass
