from dataclasses import dataclass
from math import ceil
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from secateur.pruners.base import EXTRA, ImageShape, Pruner, Selection, Status, VisualTokens
from secateur.pruners.linalg import (
    cosine_gram,
    gather_rows,
    largest_remainder,
    mean_similarity,
    non_maximum_suppression,
    principal_axes,
    top_k,
)
from secateur.pruners.registry import register


class Allocation(NamedTuple):
    """The result of PruneSID's suppression and quotas."""

    picks: Tensor  # [B, patches] in the official order, group after group
    survivors: Tensor  # [B, groups] tokens that survive the suppression
    quota: Tensor  # [B, groups] tokens kept
    redundancy: Tensor  # [B] rho


@register("prunesid")
@dataclass(frozen=True)
class PruneSID(Pruner):
    """Groups tokens by principal component and suppresses near-duplicates within each group.

    Fang et al., "Prune Redundancy, Preserve Essence: Vision Token Compression in VLMs via
    Synergistic Importance-Diversity", ICLR 2026, arXiv 2603.09480.

    Args:
        variant: the released code has two paths. `llava`: encoder features, the CLS token kept and
            counted, threshold budget / 32 * rho. `qwen`: projected tokens, rho as coded there
            (diagonal included, about half of the paper's), threshold max(18 * budget / N, 1) * rho.
        score: importance within a group. `official`: that of the variant, `attention` of CLS summed
            over heads for llava, the `loading` on the group's component for qwen (and in the
            paper).
        centring: what is subtracted before the components: each token's mean over `channels`
            (code), or the mean over `tokens` (paper).
        quotas: `capped`, with a floor of 1 and a cap of 5 * ceil(budget / 64) per group (code), or
            `proportional` to the survivors (paper; largest remainders).
        keep_cls: llava only: the CLS token goes on first and counts in the budget (code; the paper
            does not say).
        pca: `randomized` as the released code, or `exact`.
        seed: of the randomised components; report several.
        order: `spatial` (CLS first), or `official`: group after group; for qwen only up to 150
            tokens.

    Deviations: similarities in float32 (released: float16 or the model's dtype); randomised
    components from a generator on the CPU (released: the device's global one); budgets below 4 use
    one group (released: none); qwen budgets below 16 are met (released: raised), and its images
    pruned apart (released: together); budget N leaves all patches alone (released: CLS and N - 1
    patches).
    """

    variant: Literal["llava", "qwen"] = "llava"
    score: Literal["official", "attention", "loading"] = "official"
    centring: Literal["channels", "tokens"] = "channels"
    quotas: Literal["capped", "proportional"] = "capped"
    keep_cls: bool = True
    pca: Literal["randomized", "exact"] = "randomized"
    seed: int = 0
    order: Literal["spatial", "official"] = "spatial"

    paper = "arXiv 2603.09480"
    status: ClassVar[Status] = "official"

    @property
    def needs(self) -> frozenset[str]:
        optional = {
            "encoder_features": self.variant == "llava",
            "cls_token": self._cls,
            "saliency": self._attention,
        }
        return frozenset({"features", *(name for name, needed in optional.items() if needed)})

    @property
    def _cls(self) -> bool:
        return self.keep_cls and self.variant == "llava"

    @property
    def _attention(self) -> bool:
        return self.score == "attention" or (self.score == "official" and self.variant == "llava")

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        x = tokens.encoder_features if self.variant == "llava" else tokens.features
        assert x is not None
        result = self.allocate(x, self.loadings(x, keep), tokens.saliency, keep)
        in_groups = self.order == "official" and (self.variant == "llava" or keep <= 150)
        picks = result.picks if in_groups else result.picks.sort(1).values
        diagnostics = {"rho": result.redundancy, "survivors": result.survivors.sum(1)}
        if not self._cls:
            return Selection(picks, custom_order=in_groups, diagnostics=diagnostics)
        assert tokens.cls_token is not None
        features = torch.cat([tokens.cls_token[:, None], gather_rows(x, picks)], 1)
        extra = picks.new_full((len(picks), 1), EXTRA)
        return Selection(
            torch.cat([extra, picks], 1),
            features,
            "encoder",
            custom_order=in_groups,
            diagnostics=diagnostics,
        )

    def flops(self, shape: ImageShape) -> float:
        """The Gram matrix, the CLS attention and 5 products of the randomised components.

        The QR factorisations are left out.
        """
        qwen = self.variant == "qwen"
        width = shape.width if qwen else shape.encoder_width
        gram = shape.gram if qwen else shape.encoder_gram
        attention = shape.cls_attention if self._attention else 0
        return gram + attention + 2 * 5 * shape.tokens * width * (shape.kept // 4)

    def loadings(self, x: Tensor, keep: int) -> Tensor:
        """[B, N, groups] absolute loadings of x [B, N, C] on its sigmoid's leading axes."""
        groups = max(keep // 4, 1 if self.variant == "llava" else 4)
        centred = x.sigmoid()
        centred -= centred.mean(2 if self.centring == "channels" else 1, keepdim=True)
        axes = min(groups, *x.shape[1:])
        return principal_axes(
            centred.transpose(1, 2), axes, self.seed if self.pca == "randomized" else None
        ).abs()

    def allocate(
        self, x: Tensor, loadings: Tensor, saliency: Tensor | None, keep: int
    ) -> Allocation:
        """Suppression within the groups and quotas between them, given the loadings."""
        count, patches = x.shape[1], keep - self._cls
        strength, group = loadings.max(2)
        score = saliency.sum(1) if self._attention and saliency is not None else strength
        similarity = cosine_gram(x)
        rho, factor = mean_similarity(similarity), keep / 32
        if self.variant == "qwen":
            rho = (rho * (count - 1) / 2 + similarity.diagonal(dim1=1, dim2=2).mean(1)) / count
            factor = max(18 * keep / count, 1)

        order = top_k(score, count)
        kept = suppress(similarity, group, order.argsort(1), factor * rho, score > 0)
        zeros = torch.zeros_like(loadings[:, 0], dtype=torch.long)
        size = zeros.scatter_add(1, group, torch.ones_like(group))
        survivors = zeros.scatter_add(1, group, kept.long())
        quota = self._quotas(size, survivors, patches, keep)

        # group after group; within a group the kept, then the suppressed, by descending score
        key = (2 * group + (~kept).long()).gather(1, order)
        ranking = order.gather(1, key.sort(dim=1, stable=True).indices)
        member = group.gather(1, ranking)
        place = torch.arange(count, device=x.device) - (size.cumsum(1) - size).gather(1, member)
        chosen = place < quota.gather(1, member)
        picks = ranking.gather(1, top_k(chosen.float(), patches))
        return Allocation(picks, survivors, quota, rho)

    def _quotas(self, size: Tensor, survivors: Tensor, patches: int, keep: int) -> Tensor:
        share = survivors / survivors.sum(1, keepdim=True).clamp_min(1)
        if self.quotas == "proportional":
            upper = size
            quota = largest_remainder(share, patches).minimum(upper)
        else:
            lower = size.clamp_max(1)
            other = (patches - lower.sum(1, keepdim=True)).clamp_min(0)
            upper = survivors.clamp_max(5 * ceil(keep / 64))
            raised = torch.minimum(
                upper[:, None] + torch.arange(keep + 1, device=size.device)[:, None], size[:, None]
            )
            lift = (raised.sum(2) < keep).sum(
                1
            )  # all caps rise together until they hold the budget
            upper = raised.gather(1, lift[:, None, None].expand_as(upper[:, None]))[:, 0]
            # rounding the running sum, in the precision of the released code, decides exact halves
            steps = (share.double().cumsum(1).float() * other).round().long()
            quota = (steps.diff(dim=1, prepend=torch.zeros_like(other)) + lower).minimum(upper)
        visit = top_k(
            survivors, size.shape[1]
        )  # what is left goes to the groups with most survivors
        room = (upper - quota).gather(1, visit)
        missing = patches - quota.sum(1, keepdim=True) - (room.cumsum(1) - room)
        return quota.scatter_add(1, visit, missing.clamp_min(0).minimum(room))


def suppress(
    similarity: Tensor, group: Tensor, rank: Tensor, threshold: Tensor, candidates: Tensor
) -> Tensor:
    """[B, N] candidates left after suppression within the groups.

    A candidate is suppressed when its similarity to a surviving candidate of the same group and
    of higher rank exceeds the threshold [B].
    """
    rivals = (group[:, :, None] == group[:, None]) & (rank[:, :, None] < rank[:, None])
    return non_maximum_suppression(
        (rivals & (similarity > threshold[:, None, None])).float(), candidates
    )
