from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from secateur.pruners.base import EXTRA, ImageShape, Pruner, Selection, Status, VisualTokens
from secateur.pruners.groups import (
    group_quotas,
    k_means_flops,
    k_means_groups,
    random_groups,
    suppress,
)
from secateur.pruners.linalg import (
    cosine_gram,
    gather_rows,
    mean_similarity,
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
            counted, threshold budget / alpha * rho. `qwen`: projected tokens, rho as coded there
            (diagonal included, about half of the paper's), threshold
            max(576 / alpha * budget / N, 1) * rho.
        score: importance within a group. `official`: that of the variant, `attention` of CLS summed
            over heads for llava, the `loading` on the group's component for qwen (and in the
            paper). `norm`: the token's L2 norm.
        grouping: by `psca`, the components; for the ablations by `kmeans` of the tokens, or at
            `random` into groups of one size (Table 5).
        groups: how many (Table 6); None: budget / 4, rounded down.
        centring: what is subtracted before the components: each token's mean over `channels`
            (code), or the mean over `tokens` (paper).
        quotas: `capped`, with a floor of 1 and a cap of 5 * ceil(budget / 64) per group (code), or
            `proportional` to the survivors (paper; largest remainders).
        keep_cls: llava only: the CLS token goes on first and counts in the budget (code; the paper
            does not say).
        pca: `randomized` as the released code, or `exact`.
        seed: of the randomised components, random groups and first means; report several.
        nms: the suppression within groups. Without it, every token of a group survives (Table 13,
            "w/o NMS", and Table 14, "Ascend").
        alpha: divides the budget in the threshold (Table 15).
        least_first: the least important tokens go first (Table 14, "Descend").
        order: `spatial` (CLS first), or `official`: group after group; for qwen only up to 150
            tokens.

    Table 13's "w/o PSCA" is grouping=random with score=norm.

    Deviations: similarities in float32 (released: float16 or the model's dtype); randomised
    components from a generator on the CPU (released: the device's global one); budgets below 4 use
    one group (released: none); qwen budgets below 16 are met (released: raised), and its images
    pruned apart (released: together); budget N leaves all patches alone (released: CLS and N - 1
    patches). No code of the ablations is public. Ours are the start and the 30 rounds of k-means, a
    shuffle per image for random groups, the largest norm first, and, without suppression, quotas
    that follow from the sizes of the groups.
    """

    variant: Literal["llava", "qwen"] = "llava"
    score: Literal["official", "attention", "loading", "norm"] = "official"
    grouping: Literal["psca", "kmeans", "random"] = "psca"
    groups: Annotated[int, Field(ge=1)] | None = None
    centring: Literal["channels", "tokens"] = "channels"
    quotas: Literal["capped", "proportional"] = "capped"
    keep_cls: bool = True
    pca: Literal["randomized", "exact"] = "randomized"
    seed: int = 0
    nms: bool = True
    alpha: Annotated[float, Field(gt=0)] = 32.0
    least_first: bool = False
    order: Literal["spatial", "official"] = "spatial"

    paper = "arXiv 2603.09480"
    status: ClassVar[Status] = "official"

    def __post_init__(self) -> None:
        super().__post_init__()
        idle = [] if self.nms else [("alpha", "nms=false")]
        if self.grouping != "psca":
            cause = f"grouping={self.grouping}"
            idle += [("centring", cause), ("pca", cause)]
            if self._score == "loading":
                self.fail(
                    f"score={self.score} is the loading on a component, which {cause} does not "
                    "have; use score=attention or score=norm"
                )
        for name, cause in idle:
            if (value := getattr(self, name)) != getattr(PruneSID, name):
                self.fail(f"{name}={value} has no effect with {cause}; leave it out")

    @property
    def needs(self) -> frozenset[str]:
        optional = {
            "encoder_features": self.variant == "llava",
            "cls_token": self._cls,
            "saliency": self._score == "attention",
        }
        return frozenset({"features", *(name for name, needed in optional.items() if needed)})

    @property
    def _cls(self) -> bool:
        return self.keep_cls and self.variant == "llava"

    @property
    def _score(self) -> str:
        official = "attention" if self.variant == "llava" else "loading"
        return official if self.score == "official" else self.score

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        x = tokens.encoder_features if self.variant == "llava" else tokens.features
        assert x is not None
        match self.grouping:
            case "psca":
                loadings = self.loadings(x, keep)
            case "kmeans":
                loadings = k_means_groups(x, self._groups(keep, *x.shape[1:]), self.seed)
            case "random":
                loadings = random_groups(tokens, self._groups(keep, *x.shape[1:]), self.seed)
        result = self.allocate(x, loadings, tokens.saliency, keep)
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
        """The Gram matrix, the CLS attention, and the products of the grouping.

        Randomised components take 5; their QR factorisations are left out.
        """
        qwen = self.variant == "qwen"
        width = shape.width if qwen else shape.encoder_width
        gram = shape.gram if qwen else shape.encoder_gram
        attention = shape.cls_attention if self._score == "attention" else 0
        groups = self.groups or shape.kept // 4
        grouping = {
            "psca": 2 * 5 * shape.tokens * width * groups,
            "kmeans": k_means_flops(shape.tokens, width, groups),
            "random": 0,
        }[self.grouping]
        return gram + attention + grouping

    def loadings(self, x: Tensor, keep: int) -> Tensor:
        """[B, N, groups] absolute loadings of x [B, N, C] on its sigmoid's leading axes."""
        centred = x.sigmoid()
        centred -= centred.mean(2 if self.centring == "channels" else 1, keepdim=True)
        return principal_axes(
            centred.transpose(1, 2),
            self._groups(keep, *x.shape[1:]),
            self.seed if self.pca == "randomized" else None,
        ).abs()

    def _groups(self, keep: int, count: int, width: int) -> int:
        most = min(count, width) if self.grouping == "psca" else count
        if self.groups is None:
            return min(max(keep // 4, 1 if self.variant == "llava" else 4), most)
        most = min(most, keep - self._cls)
        if self.groups > most:
            self.fail(
                f"groups={self.groups}: a budget of {keep} of {count} tokens of width {width} "
                f"has room for {most} groups at most; lower groups or raise the budget"
            )
        return self.groups

    def allocate(
        self, x: Tensor, loadings: Tensor, saliency: Tensor | None, keep: int
    ) -> Allocation:
        """Suppression within the groups and quotas between them, given the loadings.

        A token belongs to the group of its largest loading.
        """
        count, patches = x.shape[1], keep - self._cls
        strength, group = loadings.max(2)
        score = x.norm(dim=2) if self._score == "norm" else strength
        if self._score == "attention":
            assert saliency is not None
            score = saliency.sum(1)
        similarity = cosine_gram(x)
        rho, factor = mean_similarity(similarity), keep / self.alpha
        if self.variant == "qwen":
            rho = (rho * (count - 1) / 2 + similarity.diagonal(dim1=1, dim2=2).mean(1)) / count
            factor = max(576 / self.alpha * keep / count, 1)

        order, kept = top_k(-score if self.least_first else score, count), score > 0
        if self.nms:
            kept = suppress(similarity, group, order.argsort(1), factor * rho, kept)
        zeros = torch.zeros_like(loadings[:, 0], dtype=torch.long)
        size = zeros.scatter_add(1, group, torch.ones_like(group))
        survivors = zeros.scatter_add(1, group, kept.long())
        quota = group_quotas(size, survivors, patches, keep, self.quotas == "capped")

        # group after group; within a group the kept, then the suppressed, in order of score
        key = (2 * group + (~kept).long()).gather(1, order)
        ranking = order.gather(1, key.sort(dim=1, stable=True).indices)
        member = group.gather(1, ranking)
        place = torch.arange(count, device=x.device) - (size.cumsum(1) - size).gather(1, member)
        chosen = place < quota.gather(1, member)
        picks = ranking.gather(1, top_k(chosen.float(), patches))
        return Allocation(picks, survivors, quota, rho)
