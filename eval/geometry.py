"""Models without weights: the true geometry of the supported checkpoints, tiny and reduced forms, drawn models, a processor.

For what depends on shapes alone: FLOPs, latencies, tests of the whole path. The answers of such a model mean nothing.
"""

import copy
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from secateur.prompts import LLAVA

# Qwen2.5-VL's own: a system turn where the chat has none, images in place
QWEN = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# CLIP towers: hidden_size, intermediate_size, layers, heads, image_size; Qwen's: ..., window_size, full attention blocks
_CLIP_L_336 = (1024, 4096, 24, 16, 336)
_TINY_CLIP = (64, 128, 4, 4, 56)
_QWEN_VISION = (1280, 3420, 32, 16, 112, [7, 15, 23, 31])
_TINY_QWEN_VISION = (64, 128, 4, 4, 56, [1, 3])
# language models: hidden_size, intermediate_size, layers, heads, key heads, vocabulary
_VICUNA_7B = (4096, 11008, 32, 32, 32, 32064)
_VICUNA_13B = (5120, 13824, 40, 40, 40, 32064)
_QWEN_7B = (3584, 18944, 28, 28, 4, 152064)
_QWEN_3B = (2048, 11008, 36, 16, 2, 151936)
_TINY_VICUNA = (64, 160, 4, 4, 4, 320)
_TINY_QWEN = (64, 160, 4, 4, 2, 320)
_NEXT_PINPOINTS = [[1, 2], [2, 1], [2, 2], [3, 1], [1, 3]]  # in crops


def config_of(name: str) -> PreTrainedConfig:
    """The configuration of a hub checkpoint, by the name of its file in configs/model.

    From config.json of llava-hf/llava-1.5-{7b,13b}-hf, llava-hf/llava-v1.6-vicuna-7b-hf and Qwen/Qwen2.5-VL-{7B,3B}-Instruct.

    Raises:
        ValueError: an unknown name.
    """
    made = {
        "llava_1_5_7b": lambda: _llava(LlavaConfig, _CLIP_L_336, _VICUNA_7B),
        "llava_1_5_13b": lambda: _llava(LlavaConfig, _CLIP_L_336, _VICUNA_13B),
        "llava_next_7b": lambda: _llava(LlavaNextConfig, _CLIP_L_336, _VICUNA_7B, _NEXT_PINPOINTS),
        "qwen2_5_vl_7b": lambda: _qwen(_QWEN_VISION, _QWEN_7B, [16, 24, 24]),
        "qwen2_5_vl_3b": lambda: _qwen(_QWEN_VISION, _QWEN_3B, [16, 24, 24], tied=True),
    }
    if name not in made:
        raise ValueError(f"no geometry for the model {name!r}; known: {', '.join(made)}")
    return made[name]()


def tiny(family: str) -> PreTrainedConfig:
    """Four layers of width 64 for tests.

    llava: 56 px, 4 x 4 tokens. llava_next: crops of these, five pinpoints; llava_next_fixed: the one of 2 x 2 crops, so that
    every image is 1 + 4. qwen2_5_vl: grouped queries (4 heads, 2 for keys), windows of 2 x 2 merged tokens, full attention in
    vision blocks 1 and 3.

    Raises:
        ValueError: an unknown family.
    """
    made = {
        "llava": lambda: _llava(LlavaConfig, _TINY_CLIP, _TINY_VICUNA),
        "llava_next": lambda: _llava(LlavaNextConfig, _TINY_CLIP, _TINY_VICUNA, _NEXT_PINPOINTS),
        "llava_next_fixed": lambda: _llava(LlavaNextConfig, _TINY_CLIP, _TINY_VICUNA, [[2, 2]]),
        "qwen2_5_vl": lambda: _qwen(_TINY_QWEN_VISION, _TINY_QWEN, [2, 3, 3], first_special=300),
    }
    if family not in made:
        raise ValueError(f"no tiny model of the family {family!r}; known: {', '.join(made)}")
    return made[family]()


def reduced(config: PreTrainedConfig, layers: int, shrink: int = 1) -> PreTrainedConfig:
    """The same image geometry and head width with fewer layers in tower and LLM, and widths and heads divided by `shrink`.

    In Qwen's tower every eighth block, counted from the last, attends to the whole image, as in the original.

    Raises:
        ValueError: fewer than 2 layers (LLaVA reads the last but one), or `shrink` does not divide the heads.
    """
    if layers < 2:
        raise ValueError(f"layers={layers}: at least 2")
    config = copy.deepcopy(config)
    qwen, text, vision = config.model_type == "qwen2_5_vl", config.text_config, config.vision_config
    vision_layers, vision_heads = (
        ("depth", "num_heads") if qwen else ("num_hidden_layers", "num_attention_heads")
    )
    for part, heads in ((text, "num_attention_heads"), (vision, vision_heads)):
        if getattr(part, heads) % shrink:
            raise ValueError(
                f"shrink={shrink} does not divide the {getattr(part, heads)} heads of {type(part).__name__}"
            )
        for name in (heads, "hidden_size", "intermediate_size"):
            setattr(part, name, getattr(part, name) // shrink)
    text.num_key_value_heads = max(1, text.num_key_value_heads // shrink)
    text.num_hidden_layers = layers
    setattr(vision, vision_layers, layers)
    if qwen:
        text.layer_types = text.layer_types[:layers]
        vision.out_hidden_size = text.hidden_size
        vision.fullatt_block_indexes = [
            block for block in range(layers) if (layers - 1 - block) % 8 == 0
        ]
    return config


@torch.no_grad()
def random_model(
    config: PreTrainedConfig,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    seed: int = 0,
    std: float = 0.02,
) -> PreTrainedModel:
    """A model of this configuration, drawn on the device itself: 7B in bfloat16 takes seconds on a GPU.

    Args:
        device: `meta` gives shapes without memory.
        std: of all matrices; norms are 1, biases 0. At the default attention is near uniform, and dropping tokens moves little:
            tests want 0.2.

    Returns:
        The model in eval mode, `config` untouched.
    """
    config = copy.deepcopy(config)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    device = torch.device(device)
    if device.type != "meta":
        model.to_empty(device=device)
    model.tie_weights()
    if device.type != "meta":
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            model.init_weights()  # also the buffers, which no checkpoint holds
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=std)
    generation, text = model.generation_config, config.text_config
    generation.bos_token_id, generation.eos_token_id = text.bos_token_id, text.eos_token_id
    generation.pad_token_id = text.pad_token_id
    return model.eval()


def random_processor(config: PreTrainedConfig) -> ProcessorMixin:
    """A processor with the image geometry of `config` and a byte tokenizer made for it.

    The tokenizer has the special tokens at the ids of `config` and one token a byte; all other ids up to the vocabulary's end
    are names that no text encodes to, so that whatever a random model says decodes to something.
    """
    text, vision = config.text_config, config.vision_config
    if config.model_type == "qwen2_5_vl":
        return Qwen2_5_VLProcessor(
            image_processor=Qwen2VLImageProcessor(
                patch_size=vision.patch_size, merge_size=vision.spatial_merge_size
            ),
            video_processor=Qwen2VLVideoProcessor(
                patch_size=vision.patch_size, merge_size=vision.spatial_merge_size
            ),
            tokenizer=_byte_tokenizer(
                text.vocab_size,
                {
                    "<|endoftext|>": text.pad_token_id,
                    "<|im_start|>": text.eos_token_id - 1,
                    "<|im_end|>": text.eos_token_id,
                    "<|vision_start|>": config.vision_start_token_id,
                    "<|vision_end|>": config.vision_end_token_id,
                    "<|image_pad|>": config.image_token_id,
                    "<|video_pad|>": config.video_token_id,
                },
                eos_token="<|im_end|>",
                pad_token="<|endoftext|>",
                extra_special_tokens={
                    "image_token": "<|image_pad|>",
                    "video_token": "<|video_pad|>",
                },
            ),
            chat_template=QWEN,
        )
    is_next = config.model_type == "llava_next"
    geometry: dict[str, Any] = {
        "size": {"shortest_edge": vision.image_size},
        "crop_size": {"height": vision.image_size, "width": vision.image_size},
    }
    if is_next:
        geometry["image_grid_pinpoints"] = config.image_grid_pinpoints
    return (LlavaNextProcessor if is_next else LlavaProcessor)(
        image_processor=(LlavaNextImageProcessor if is_next else CLIPImageProcessor)(**geometry),
        tokenizer=_byte_tokenizer(
            text.vocab_size,
            {
                "<s>": text.bos_token_id,
                "</s>": text.eos_token_id,
                "<image>": config.image_token_id,
                "<pad>": text.pad_token_id,
            },
            begin="<s>",
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            extra_special_tokens={"image_token": "<image>"},
        ),
        patch_size=vision.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,  # CLS
        image_token="<image>",
        chat_template=LLAVA,
    )


def _llava(
    family: type[LlavaConfig] | type[LlavaNextConfig],
    vision: tuple[int, ...],
    text: tuple[int, ...],
    pinpoints: list[list[int]] | None = None,
) -> PreTrainedConfig:
    """`pinpoints` in crops, for LLaVA-NeXT."""
    hidden, intermediate, layers, heads, side = vision
    tower = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=side,
        patch_size=14,
        projection_dim=768,
    )
    pad = (
        text[-1] - 63
    )  # llava-hf pads Vicuna's 32,000 tokens to 32,064: <image> and <pad> come first
    names: dict[str, Any] = {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": pad,
        "tie_word_embeddings": False,
    }
    options: dict[str, Any] = (
        {}
        if pinpoints is None
        else {"image_grid_pinpoints": [[side * a, side * b] for a, b in pinpoints]}
    )
    return family(
        vision_config=tower,
        text_config=LlamaConfig(
            **_language(*text), max_position_embeddings=4096, rms_norm_eps=1e-5, **names
        ),
        image_token_index=pad - 1,
        image_seq_length=(side // 14) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        **options,
    )


def _qwen(
    vision: tuple[Any, ...],
    text: tuple[int, ...],
    mrope_section: list[int],
    tied: bool = False,
    first_special: int = 151643,
) -> PreTrainedConfig:
    """`first_special` is the id of <|endoftext|>; the other special tokens follow it as in Qwen's vocabulary."""
    hidden, intermediate, depth, heads, window, full = vision
    tower = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "depth": depth,
        "num_heads": heads,
        "window_size": window,
        "fullatt_block_indexes": list(full),
        "out_hidden_size": text[0],
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
    }
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": mrope_section}
    names = {
        "bos_token_id": first_special,
        "eos_token_id": first_special + 2,
        "pad_token_id": first_special,
    }
    language = {
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": rope,
        "tie_word_embeddings": tied,
    }
    return Qwen2_5_VLConfig(
        vision_config=tower,
        text_config=_language(*text) | language | names,
        vision_start_token_id=first_special + 9,
        vision_end_token_id=first_special + 10,
        image_token_id=first_special + 12,
        video_token_id=first_special + 13,
        tie_word_embeddings=tied,
    )


def _language(
    hidden: int, intermediate: int, layers: int, heads: int, key_heads: int, vocabulary: int
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
    }


def _byte_tokenizer(
    vocabulary: int, special: dict[str, int], begin: str | None = None, **named: Any
) -> PreTrainedTokenizerFast:
    """Special tokens at their ids, bytes at the first free ones, fillers behind; `begin` opens every text."""
    free = iter(sorted(set(range(vocabulary)) - set(special.values())))
    ids = dict(special)
    ids |= {byte: next(free) for byte in sorted(pre_tokenizers.ByteLevel.alphabet())}
    ids |= {f"[{number}]": number for number in free}
    core = Tokenizer(models.BPE(vocab=ids, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(special))
    if begin is not None:
        core.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, ids[begin])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        **named,
    )
