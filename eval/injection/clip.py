"""Patches and question in CLIP's joint space, for methods that compare them there."""

import functools
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import CLIPModel, CLIPTokenizer

from secateur import hub
from secateur.checkpoints import locate, not_loaded, pinned

_QUESTIONS = 2**14  # kept in memory, more than a task has: 3 KB each


class ClipRelevance(nn.Module):
    """The parts of CLIP beside its vision tower: the text tower and both projections.

    As in the released code of CDPruner (arXiv 2506.10967), but in float32 whatever the model's
    dtype, the norm after the vision tower included. A model that trained its tower further, as
    LLaVA-NeXT did, is read through CLIP's own projections, as there.

    Args:
        model: in float32; its vision tower is not kept.
        tokenizer: the model's.
    """

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.segment: int = model.text_model.config.max_position_embeddings
        self.text_model, self.text_projection = model.text_model, model.text_projection
        self.post_layernorm, self.visual_projection = (
            model.vision_model.post_layernorm,
            model.visual_projection,
        )
        self._remembered = functools.lru_cache(_QUESTIONS)(self._encoded)

    @classmethod
    def from_pretrained(
        cls,
        pretrained: str = "openai/clip-vit-large-patch14-336",
        revision: str = "main",
        device: str | torch.device = "cpu",
    ) -> "ClipRelevance":
        """The CLIP of a hub id or in a folder.

        A folder is absolute, or relative to the working directory or the project.

        Raises:
            FileNotFoundError: the checkpoint is neither on disk nor reachable, or its files are
                damaged.
            ValueError: it lacks a part of CLIP, or the tokenizer.
        """
        place, commit = str(locate(pretrained)), pinned(pretrained, revision)
        try:
            loaded: Any = hub.patiently(
                lambda: CLIPModel.from_pretrained(
                    place, revision=commit, dtype=torch.float32, output_loading_info=True
                )
            )
            tokenizer = hub.patiently(lambda: CLIPTokenizer.from_pretrained(place, revision=commit))
        except (OSError, SafetensorError) as error:
            raise FileNotFoundError(
                not_loaded(pretrained, revision, error, "model.clip")
            ) from error
        model, report = loaded
        # transformers draws missing weights at random, and makes an empty tokenizer, without an
        # error
        if missing := report["missing_keys"]:
            raise ValueError(
                f"{pretrained} is no complete CLIP: {len(missing)} weights are missing, "
                f"{min(missing)} among them"
            )
        if len(tokenizer) != (known := model.config.text_config.vocab_size):
            raise ValueError(
                f"the tokenizer of {pretrained} has {len(tokenizer)} tokens, its text tower "
                f"{known}: the tokenizer's files are missing, or another model's"
            )
        return cls(model, tokenizer).to(device)

    @torch.no_grad()
    def patches(self, encoder_features: Tensor) -> Tensor:
        """Patches in the joint space, [R, N, P].

        Args:
            encoder_features: CLIP's second last hidden states [R, N, C], of any floating dtype.

        Raises:
            ValueError: C is not the width of this CLIP's vision tower.
        """
        width, expected = encoder_features.shape[-1], self.visual_projection.in_features
        if width != expected:
            raise ValueError(
                f"the model's vision tower is {width} wide, that of this CLIP {expected}: "
                "relevance in CLIP's space needs the CLIP that the model has its vision tower from"
            )
        return self.visual_projection(
            self.post_layernorm(encoder_features.to(self.visual_projection.weight))
        )

    def text(self, question: str) -> Tensor:
        """The question in the joint space, [S, P], one row per segment; a blank one is [0, P].

        A segment has 77 tokens, start and end token included. The last one is filled up with
        id 0, masked. Only the first segment has the start token, only the last the end token.
        `pooler_output` is what transformers makes of such segments: the output at the first end
        token, or at position 0 without one; with the end token 2 in the config, as in openai's
        checkpoints, the output at the highest id.

        Results are kept in memory and shared: do not write into the tensor.
        """
        return self._remembered(question, self.text_projection.weight.device)

    @torch.no_grad()
    def _encoded(self, question: str, device: torch.device) -> Tensor:
        weight = self.text_projection.weight
        if not question.strip():
            return weight.new_empty(0, len(weight))
        # verbose warns of more than 77 tokens
        tokens = self.tokenizer(question, return_tensors="pt", verbose=False)
        fill = -tokens["input_ids"].shape[1] % self.segment
        segments = {
            name: pad(tokens[name], (0, fill)).view(-1, self.segment).to(device)
            for name in ("input_ids", "attention_mask")
        }
        return self.text_projection(self.text_model(**segments).pooler_output)
