"""Tiny checkpoints in the files, keys and field names of the true repositories."""

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, PreTrainedModel

from secateur.families.qwen2_5_vl import _TEMPLATE as QWEN_TEMPLATE
from secateur.geometry import config_of, random_model
from secateur.prompts import LLAVA

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
ANSWERS = ("Yes", "No", "A", "B")  # all that the models say: a random model would say noise
LLM = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}


def _dump(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2))


def _llama_tokenizer(folder: Path, processor: str) -> list[int]:
    """Files of a tokenizer of the LLaVA repositories; returns the ids of the answers."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ["▁", *map(chr, range(33, 127))]:
        vocabulary.setdefault(piece, len(vocabulary))
    merges = []
    for word in ANSWERS:
        for end in range(len(word)):
            pair = ("▁" + word[:end], word[end])
            vocabulary.setdefault("".join(pair), len(vocabulary))
            merges.append(pair)
    said = [vocabulary["▁" + word] for word in ANSWERS]
    vocabulary |= {f"▁w{number}": number for number in range(len(vocabulary), 32000)}
    core = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)]
    )
    special = ("<unk>", "<s>", "</s>", "<image>", "<pad>")
    core.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    core.save(str(folder / "tokenizer.json"))
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    _dump(folder / "special_tokens_map.json", named | {"image_token": "<image>"})
    _dump(folder / "added_tokens.json", {"<image>": 32000, "<pad>": 32001})
    own = {"tokenizer_class": "LlamaTokenizer", "processor_class": processor, "legacy": False}
    own |= {"extra_special_tokens": {"image_token": "<image>"}, "padding_side": "left"}
    own |= {"add_bos_token": True, "add_eos_token": False}
    ids = dict(zip(special, (0, 1, 2, 32000, 32001), strict=True))
    own |= {"added_tokens_decoder": _added(ids)}
    _dump(folder / "tokenizer_config.json", named | own)
    return said


def _added(tokens: dict[str, int]) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {str(at): {"content": token, **flags, "special": True} for token, at in tokens.items()}


def _qwen_tokenizer(folder: Path) -> list[int]:
    """The same of the Qwen repositories."""
    names = "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start"
    names += " quad_end vision_start vision_end vision_pad image_pad video_pad"
    special = {f"<|{name}|>": 151643 + at for at, name in enumerate(names.split())}
    vocabulary = {byte: at for at, byte in enumerate(sorted(ByteLevel.alphabet()))}
    merges = [("Y", "e"), ("Ye", "s"), ("N", "o")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    said = [vocabulary[word] for word in ANSWERS]
    vocabulary |= {f"[{number}]": number for number in range(len(vocabulary), 151643)}
    core = Tokenizer(models.BPE(vocabulary, merges))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    core.save(str(folder / "tokenizer.json"))
    _dump(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("#version: 0.2\nY e\nYe s\nN o\n")
    own = {"tokenizer_class": "Qwen2Tokenizer", "chat_template": QWEN_TEMPLATE, "bos_token": None}
    own |= {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
    own |= {"additional_special_tokens": list(special)[1:], "added_tokens_decoder": _added(special)}
    _dump(folder / "tokenizer_config.json", own | {"add_bos_token": False})
    return said


def _weights(model: PreTrainedModel, folder: Path, said: Sequence[int], shards: int) -> None:
    """Shards with an index, under the keys that the repositories have."""
    scratch = folder / "scratch"
    model.save_pretrained(scratch)  # it writes the old keys
    state: dict[str, torch.Tensor] = {}
    for file in scratch.glob("*.safetensors"):
        state |= load_file(file)
    shutil.rmtree(scratch)
    old = "vision_tower.vision_model."  # of LLaVA's towers
    state = {
        name.replace("vision_tower.", old) if old not in name else name: tensor
        for name, tensor in state.items()
    }
    head = next((name for name in state if name.endswith("lm_head.weight")), None)
    if head:
        own = state[head][said].clone()
        state[head] *= 0.001
        state[head][said] = own
    names = sorted(state)
    where = {}
    for shard in range(shards):
        part = {name: state[name] for name in names[shard::shards]}
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    _dump(folder / "model.safetensors.index.json", index)


def llava(folder: Path, name: str, seed: int = 0) -> None:
    """As `llava-hf/llava-1.5-7b-hf` or, for `llava_next_*`, `llava-hf/llava-v1.6-vicuna-7b-hf`."""
    folder.mkdir(parents=True)
    after = name.startswith("llava_next")
    config = copy.deepcopy(config_of(name))
    text, vision = config.text_config, config.vision_config
    for part, sizes in ((text, LLM), (vision, TOWER)):
        for field, size in sizes.items():
            setattr(part, field, size)
    text.num_key_value_heads, text.head_dim, vision.num_attention_heads = 4, 8, 4
    kind = "LlavaNext" if after else "Llava"
    said = _llama_tokenizer(folder, f"{kind}Processor")
    model = random_model(config, dtype=torch.float16, std=0.2, seed=seed)
    _weights(model, folder, said, shards=3)
    small = {**LLM, "model_type": "llama", "num_key_value_heads": 4, "vocab_size": 32064}
    tower = {**TOWER, "model_type": "clip_vision_model", "num_attention_heads": 4}
    grids = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    own: dict[str, Any] = {
        "architectures": [f"{kind}ForConditionalGeneration"],
        "model_type": "llava_next" if after else "llava",
        "text_config": small | {"max_position_embeddings": 4096, "rms_norm_eps": 1e-05},
        "vision_config": tower | {"image_size": 336, "patch_size": 14, "projection_dim": 768},
        "image_token_index": 32000,
        "ignore_index": -100,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }
    own |= {"image_grid_pinpoints": grids} if after else {"pad_token_id": 32001}
    _dump(folder / "config.json", own)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 32001}
    _dump(folder / "generation_config.json", {"_from_model_config": True, **ends})
    steps = dict.fromkeys(
        ("do_center_crop", "do_convert_rgb", "do_normalize", "do_rescale", "do_resize"), True
    )
    images: dict[str, Any] = {
        **steps,
        "image_processor_type": "LlavaNextImageProcessor" if after else "CLIPImageProcessor",
        "processor_class": f"{kind}Processor",
        "crop_size": {"height": 336, "width": 336},
        "size": {"shortest_edge": 336},
        "image_mean": MEAN,
        "image_std": STD,
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
    }
    images |= {"do_pad": True, "image_grid_pinpoints": grids} if after else {}
    _dump(folder / "preprocessor_config.json", images)
    _dump(
        folder / "processor_config.json",
        {
            "processor_class": f"{kind}Processor",
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
        },
    )
    _dump(folder / "chat_template.json", {"chat_template": LLAVA})
    (folder / "README.md").write_text("---\nlanguage: en\n---\n")


def qwen(folder: Path, name: str, seed: int = 0) -> None:
    """As `Qwen/Qwen2.5-VL-7B-Instruct` or, for `qwen2_vl_*`, `Qwen/Qwen2-VL-7B-Instruct`."""
    folder.mkdir(parents=True)
    newer = name.startswith("qwen2_5")
    config = copy.deepcopy(config_of(name))
    text, vision = config.text_config, config.vision_config
    for field, size in LLM.items():
        setattr(text, field, size)
    text.num_key_value_heads, text.layer_types = 2, ["full_attention"] * 4
    text.rope_parameters["mrope_section"] = [1, 1, 2]
    sizes = {"depth": 4, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2}
    if newer:
        sizes |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32}
        sizes |= {"fullatt_block_indexes": [1, 3]}  # type: ignore[dict-item]
    else:
        sizes |= {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    for field, value in sizes.items():
        setattr(vision, field, value)
    model = random_model(config, dtype=torch.bfloat16, std=0.2, seed=seed)
    _weights(model, folder, _qwen_tokenizer(folder), shards=5)
    kind = "Qwen2_5_VL" if newer else "Qwen2VL"
    tied = config.tie_word_embeddings
    flat = {  # the language model's fields stand beside the others
        "architectures": [f"{kind}ForConditionalGeneration"],
        "model_type": "qwen2_5_vl" if newer else "qwen2_vl",
        **LLM,
        "num_key_value_heads": 2,
        "vocab_size": text.vocab_size,
        "hidden_act": "silu",
        "max_position_embeddings": text.max_position_embeddings,
        "max_window_layers": 28,
        "use_sliding_window": False,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_config": sizes | {"in_chans": 3, "spatial_patch_size": 14},
    }
    _dump(folder / "config.json", flat)
    ends = {"bos_token_id": 151643, "pad_token_id": 151643, "eos_token_id": [151645, 151643]}
    drawn = {"do_sample": True, "temperature": 1e-06, "repetition_penalty": 1.05}
    _dump(folder / "generation_config.json", ends | drawn)
    images = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": f"{kind}Processor",
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": MEAN,
        "image_std": STD,
    }
    _dump(folder / "preprocessor_config.json", images)
    _dump(folder / "chat_template.json", {"chat_template": QWEN_TEMPLATE})
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")


def clip(folder: Path, seed: int = 0) -> None:
    """As `openai/clip-vit-large-patch14-336`: weights as pytorch_model.bin alone."""
    folder.mkdir(parents=True)
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "vocab_size": 514, "projection_dim": 32}
    text |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    vision = {**TOWER, "num_attention_heads": 4, "image_size": 336, "patch_size": 14}
    config = CLIPConfig(
        text_config=text, vision_config=vision | {"projection_dim": 32}, projection_dim=32
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config).half()
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    letters = sorted(ByteLevel.alphabet())
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    ids = {token: at for at, token in enumerate(vocabulary)}
    ids |= {"<|startoftext|>": 512, "<|endoftext|>": 513}
    CLIPTokenizer(vocab=ids, merges=[]).save_pretrained(folder)
