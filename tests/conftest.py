"""Fixtures: tiny real transformers models with weights drawn wide, so that dropping tokens moves the logits."""

import os
import tempfile

_CACHE = tempfile.TemporaryDirectory(prefix="secateur-tests-")
# before the libraries read them; one thread a worker, as the golden vectors were made
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": _CACHE.name, "OMP_NUM_THREADS": "1"}

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from eval.prompts import LLAVA
from eval.shapes.training import make_tokenizer

SIDE, PATCH = 56, 14  # 4 x 4 visual tokens


@pytest.fixture(scope="session")
def processor() -> LlavaProcessor:
    square = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=square),
        tokenizer=make_tokenizer([], 300),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA,
        image_token="<image>",
    )


def tiny_llava(processor: LlavaProcessor, attention: str) -> LlavaForConditionalGeneration:
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, image_size=SIDE, patch_size=PATCH
        ),
        text_config=LlamaConfig(
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIDE // PATCH) ** 2,
        attn_implementation=attention,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the vectors, which are not drawn anew
        model = LlavaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@pytest.fixture(scope="session", params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest, processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    return tiny_llava(processor, request.param)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (48, 64, 3), dtype=np.uint8))
