"""Every family with every backend of its image processor, from a saved folder.

The settings are those of the shipped configs.
"""

import pytest
import torch
from cells import model_settings
from conftest import picture
from transformers import AutoImageProcessor

from secateur.families import family_of
from secateur.geometry import random_model, random_processor, tiny
from secateur.loading import load

SHIPPED = {
    "llava": "llava_1_5_7b",
    "llava_next": "llava_next_7b",
    "llava_onevision": "llava_onevision_7b",
    "qwen2_vl": "qwen2_vl_7b",
    "qwen2_5_vl": "qwen2_5_vl_7b",
    "qwen3_vl": "qwen3_vl_4b",
    "internvl": "internvl3_8b",
}
WITH_TORCHVISION = {"TorchvisionBackend", "BaseImageProcessorFast"}  # today's base class, and 5.0's


def backend(processor) -> str:
    bases = {base.__name__ for base in type(processor.image_processor).__mro__}
    return "torchvision" if bases & WITH_TORCHVISION else "pil"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for family in SHIPPED:
        made[family], config = tmp_path_factory.mktemp(family), tiny(family)
        random_model(config, std=0.2).save_pretrained(made[family])
        random_processor(config).save_pretrained(made[family])
    return made


def loaded(folder, family, resize):
    """Load as `secateur.models.PrunedModel` does, with the family's shipped config."""
    fields = ("name", "weights", "revision", "dtype", "attn_implementation")
    shipped = model_settings(SHIPPED[family])
    assert shipped["family"] == family
    settings = {field: shipped[field] for field in fields}
    return load(str(folder), **settings, device=torch.device("cpu"), resize=resize)


@pytest.mark.parametrize("resize", [None, "pil", "torchvision"])
@pytest.mark.parametrize("family", SHIPPED)
def test_every_backend_loads_and_the_model_answers(folders, family, resize):
    model, processor = loaded(folders[family], family, resize)
    assert backend(processor) == (resize or "torchvision")
    parts = [{"type": "image"}, {"type": "text", "text": "Why?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
    )
    batch = processor(text=[text], images=[picture(0)], return_tensors="pt").to(model.dtype)
    assert batch["pixel_values"].isfinite().all()
    assert (batch["input_ids"] == model.config.image_token_id).sum() > 0
    answer = model.generate(**batch, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert answer.shape[1] == batch["input_ids"].shape[1] + 2


@pytest.mark.parametrize("family", SHIPPED)
def test_the_backends_share_every_setting_of_the_folder(folders, family):
    """The replaced image processor is the checkpoint's: a size that is not the default stays."""
    settings = []
    for resize in ("pil", "torchvision"):
        _, processor = loaded(folders[family], family, resize)
        settings.append(
            {
                name: getattr(processor.image_processor, name)
                for name in ("size", "image_mean", "image_std")
            }
        )
    assert settings[0] == settings[1]
    if "llava" in family:
        assert 56 in dict(settings[0]["size"]).values()


def test_the_image_processor_is_of_the_revision_that_was_asked_for(folders, monkeypatch):
    asked, original = [], AutoImageProcessor.from_pretrained

    def recorded(place, **options):
        asked.append(options)
        return original(place, **options)

    monkeypatch.setattr(AutoImageProcessor, "from_pretrained", recorded)
    load(
        str(folders["qwen2_5_vl"]),
        "x",
        "pretrained",
        "abc123",
        "float32",
        "sdpa",
        torch.device("cpu"),
        "pil",
    )
    assert asked[-1]["revision"] == "abc123"


@pytest.mark.parametrize("resize", [None, "pil", "torchvision"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_limits_of_pixels_hold_in_every_backend(folders, family, resize):
    _, processor = loaded(folders[family], family, resize)
    image = picture(0).resize((300, 300))
    before = processor.image_processor(images=[image], return_tensors="pt")["image_grid_thw"]
    assert before.tolist() == [[1, 22, 22]]
    family_of(family).limit_pixels(processor, 28 * 28, 60 * 60)
    after = processor.image_processor(images=[image], return_tensors="pt")["image_grid_thw"]
    assert after.tolist() == [[1, 4, 4]]
