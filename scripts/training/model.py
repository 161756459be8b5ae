"""The embedded model with random weights, its tokenizer and its processor."""

import math
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from secateur.prompts import LLAVA
from secateur.shapes.scenes import SIZE

PATCH = 8  # pixels
SIDE = SIZE // PATCH  # patches along one side of the image


def make_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer. Each word of the suite is one token; other text encodes too."""
    specials = ["<s>", "</s>", "<pad>", "<image>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_input_names=["input_ids", "attention_mask"],
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    square = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessor(
        size={"shortest_edge": SIZE}, crop_size=square, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA,
        image_token="<image>",
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Any:
    """A LLaVA with random weights.

    At this width the loss stays on a plateau with the default initialisation of transformers, so
    embeddings and projector get larger random weights. Half of the tower's position table gets
    two-dimensional sines, so that places can be read from the first step.
    """
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=128,
    )
    text = LlamaConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        initializer_range=0.08,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.vocab["<image>"],
        image_seq_length=SIDE * SIDE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model: Any = LlavaForConditionalGeneration(config)
    projector = model.model.multi_modal_projector
    parameters = model.model.vision_tower.named_parameters()
    positions = next(p for name, p in parameters if name.endswith("position_embedding.weight"))
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(std=0.5)
        for layer in (projector.linear_1, projector.linear_2):
            layer.weight.normal_(std=layer.in_features**-0.5)
            layer.bias.zero_()
        positions[1:, :64] = 0.1 * torch.cat([_waves(axis) for axis in places().T], 1)
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def places() -> Tensor:
    """[patches, 2] x and y of the patches' centres, from -1 to 1."""
    axis = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    return torch.stack([axis.repeat(SIDE), axis.repeat_interleave(SIDE)], 1)


def _waves(at: Tensor) -> Tensor:
    """[patches, 32] sines and cosines of 16 frequencies."""
    angles = at[:, None] * math.pi / 2 * torch.arange(1, 17)
    return torch.cat([angles.sin(), angles.cos()], 1)
