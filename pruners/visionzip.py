from dataclasses import dataclass
from math import floor
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from secateur.pruners.base import EXTRA, ImageShape, Pruner, Selection, VisualTokens
from secateur.pruners.linalg import complement, gather_rows, normalize, top_k
from secateur.pruners.registry import register


@register("visionzip")
@dataclass(frozen=True)
class VisionZip(Pruner):
    """The tokens CLS attends to most, and a few cluster means of the rest.

    Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR
    2025, arXiv 2412.04467. The output is CLS, the dominant patches ascending, then the contextual
    tokens; all of them count in the budget. On LLaVA-NeXT the tiles' dominant patches come in the
    raster of the image, then the tiles' CLS tokens, then all contextual tokens (released code).

    Args:
        contextual: how many contextual tokens; None takes 5 of every 32 (54 + 10 of the README, and
            the pairs 108 + 20 and 162 + 30 quoted from the paper).
        keep_cls: the CLS token goes on first and counts in the budget (released code); False is our
            extension for encoders without one (Qwen), where the budget holds patches and contextual
            tokens only.

    Deviations: float32 (released: float16); a key of length zero has cosine 0 (released: NaN).
    """

    contextual: Annotated[int, Field(ge=0)] | None = None
    keep_cls: bool = True

    paper = "arXiv 2412.04467"
    status = "official"
    merges = True

    @property
    def needs(self) -> frozenset[str]:
        cls = {"cls_token"} if self.keep_cls else set()
        return frozenset({"features", "encoder_features", "saliency", "encoder_keys", *cls})

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        assert tokens.encoder_features is not None
        context = self.context(keep)
        if context > keep - self.keep_cls:
            self.fail(
                f"{context} contextual tokens do not fit "
                f"into a budget of {keep}{' beside CLS' * self.keep_cls}"
            )
        count = tokens.encoder_features.shape[1]
        dominant = self.dominant(tokens, keep - context - self.keep_cls)
        rest = complement(dominant, count)
        targets, others = self.split(rest, context)
        merged = gather_rows(tokens.encoder_features, targets)
        if context:
            cluster = torch.arange(context, device=targets.device)
            member = (self.assign(tokens, targets, others)[..., None] == cluster).to(merged.dtype)
            sums = member.transpose(1, 2) @ gather_rows(tokens.encoder_features, others)
            merged = merged + sums / member.sum(1).clamp_min(1)[..., None]
        ascending = dominant.sort(1).values
        indices, features = (
            [ascending, targets],
            [gather_rows(tokens.encoder_features, ascending), merged],
        )
        if self.keep_cls:
            assert tokens.cls_token is not None
            indices.insert(0, torch.full_like(rest[:, :1], EXTRA))
            features.insert(0, tokens.cls_token[:, None])
        return Selection(
            torch.cat(indices, 1),
            torch.cat(features, 1),
            "encoder",
            custom_order=True,
            unplaced=context,
        )

    def flops(self, shape: ImageShape) -> float:
        """The CLS attention and the cluster means.

        The similarity of the keys, as many times smaller as there are heads, is left out.
        """
        context = self.context(shape.kept)
        others = shape.tokens - shape.kept + self.keep_cls
        return shape.cls_attention + 2 * context * others * shape.encoder_width

    def context(self, keep: float) -> int:
        """How many contextual tokens a budget has."""
        return floor(keep * 5 / 32 + 0.5) if self.contextual is None else self.contextual

    def dominant(self, tokens: VisualTokens, count: int) -> Tensor:
        """Step 1: patches of largest attention summed over heads, descending, [B, count]."""
        assert tokens.saliency is not None
        return top_k(tokens.saliency.sum(1), count)

    def split(self, rest: Tensor, context: int) -> tuple[Tensor, Tensor]:
        """Step 3: other patches [B, R] -> even targets [B, context], rest [B, R - context]."""
        places = torch.arange(context, device=rest.device) * max(
            1, rest.shape[1] // max(context, 1)
        )
        return rest[:, places], rest[:, complement(places[None], rest.shape[1])[0]]

    def assign(self, tokens: VisualTokens, targets: Tensor, others: Tensor) -> Tensor:
        """Step 4: [B, R - context] the target each patch joins, by cosine of mean keys."""
        assert tokens.encoder_keys is not None
        assert tokens.saliency is not None
        (_, heads, count), keys = tokens.saliency.shape, tokens.encoder_keys
        if keys.shape[1] - count not in (0, 1) or keys.shape[2] % heads:
            self.fail(
                f"encoder_keys have shape {tuple(keys.shape)}, expected [B, N or 1+N, E] "
                f"with N = {count} and E a multiple of the {heads} heads"
            )
        metric = normalize(keys[:, -count:].unflatten(2, (heads, -1)).mean(2))
        return (gather_rows(metric, others) @ gather_rows(metric, targets).transpose(1, 2)).argmax(
            2
        )
