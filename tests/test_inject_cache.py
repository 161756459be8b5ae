"""The encoder cache in a block: one entry per image.

The other images of a batch do not matter, nor which method asks first.
"""

import pytest
import torch
from conftest import picture, tiny_model
from test_inject import STEPS, logits
from test_inject import encode as encode_llava
from test_inject_next import encode as encode_next
from test_inject_next import setting
from test_inject_onevision import encode as encode_onevision
from test_inject_onevision import setting as onevision
from test_inject_qwen import SIZES
from test_inject_qwen import encode as encode_qwen

from secateur.cache import EncodeCache
from secateur.geometry import random_processor, tiny
from secateur.injection import inject
from secateur.injection.encoder import ImageCache
from secateur.pruners import build

# every method but the last reads something of the encoder that none before it does
METHODS = ("divprune", "fastervlm", "hiprune", "promprune")


@pytest.fixture(
    params=[
        *("llava", "anyres", "crops", "fixed2880", "onevision"),
        *("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "internvl"),
    ]
)
def case(request, processor):
    """A model, its layout, prompts of two images, and the entries of these in the cache."""
    if request.param in ("anyres", "crops", "fixed2880"):
        model, inputs = setting(request.param, "sdpa")
        return model, request.param, encode_next(inputs, 2), 2
    if request.param == "onevision":  # tiles and a resampled mosaic
        return onevision("sdpa")[0], None, encode_onevision([[0], [1]]), 2
    if request.param == "llava":
        return tiny_model("llava", "sdpa"), None, encode_llava(processor, 2), 2
    model, own = tiny_model(request.param, "sdpa"), random_processor(tiny(request.param))
    if request.param == "internvl":  # two tiles and the whole image; one tile
        images = [picture(0).resize((240, 120)), picture(1).resize((100, 100))]
        texts = ["<IMG_CONTEXT> what is this, and why?", "<IMG_CONTEXT> short"]
        inputs = own(text=texts, images=images, padding=True, return_tensors="pt")
        return model, None, inputs, 4
    return model, None, encode_qwen(own, [[SIZES[0]], [SIZES[1]]]), 2


def answers(case, name: str, images: ImageCache) -> torch.Tensor:
    model, layout, inputs, _ = case
    with inject(model, build(name), "50%", layout=layout, cache=images):
        return logits(model.generate(**inputs, **STEPS))


def counted(images: ImageCache) -> tuple[int, int, int]:
    counts = images.cache.counts
    return counts.misses, counts.memory_hits, counts.disk_hits


def test_what_is_cached_depends_on_no_order_of_methods(case, tmp_path):
    entries = case[-1]
    plain = {name: answers(case, name, ImageCache(EncodeCache(0), "")) for name in METHODS}
    first = ImageCache(EncodeCache(10**8, tmp_path, 10**9), "")
    for number, name in enumerate(METHODS, start=1):
        assert torch.equal(answers(case, name, first), plain[name])
        # an image is encoded again for what no method has asked for before
        assert counted(first) == (
            (entries * number, 0, 0) if number < 4 else (3 * entries, entries, 0)
        )
    assert len(list(tmp_path.glob("*.safetensors"))) == entries
    for memory, found in ((0, (0, 0, 4 * entries)), (10**8, (0, 3 * entries, entries))):
        other = ImageCache(EncodeCache(memory, tmp_path, 10**9), "")  # another process
        for name in reversed(METHODS):
            assert torch.equal(answers(case, name, other), plain[name])
        assert counted(other) == found


def test_a_new_image_is_encoded_for_all_methods_so_far(case):
    images = ImageCache(EncodeCache(10**8), "", frozenset({"saliency"}))
    answers(case, "divprune", images)
    answers(case, "fastervlm", images)
    assert counted(images) == (case[-1], case[-1], 0)


@pytest.mark.parametrize("layout", ["anyres", "crops", "fixed2880"])
def test_an_image_is_found_again_beside_a_larger_one(layout):
    """In a batch its crops are filled up with zeros."""
    model, inputs = setting(layout, "sdpa")
    images = ImageCache(EncodeCache(10**8), "")
    batch, alone = encode_next(inputs, 3), encode_next(inputs, 1, first=1)
    if layout != "fixed2880":
        assert batch["pixel_values"].shape[1] > alone["pixel_values"].shape[1]
    found = []
    for given in (alone, batch, alone):
        with inject(model, build("fastervlm"), "50%", layout=layout, cache=images):
            found.append(model.generate(**given, **STEPS))
    assert counted(images) == (3, 2, 0)
    with inject(model, build("fastervlm"), "50%", layout=layout):
        plain = model.generate(**alone, **STEPS)
    for output in (found[0], found[2]):
        assert torch.equal(logits(output), logits(plain))


def test_images_of_llava_onevision_are_found_again_by_how_they_share_a_prompt():
    """Tiled where it is alone, whole beside another, and without tokens where all is padding."""
    model, images = onevision("sdpa")[0], ImageCache(EncodeCache(10**8), "")
    for prompts in ([[0], [3]], [[0, 2]], [[0], [3]], [[0, 2], [3]]):
        given = encode_onevision(prompts)
        with inject(model, build("visionzip", keep_cls=False), "50%"):
            plain = model.generate(**given, **STEPS)
        with inject(model, build("visionzip", keep_cls=False), "50%", cache=images):
            found = model.generate(**given, **STEPS)
        assert (logits(found) - logits(plain)).abs().max() < 1e-4
    assert counted(images) == (4, 5, 0)
