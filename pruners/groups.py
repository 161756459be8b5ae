"""Groups of an image's tokens: formed, thinned out, and given their shares of the budget."""

from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from secateur.pruners.base import VisualTokens
from secateur.pruners.linalg import largest_remainder, non_maximum_suppression, top_k
from secateur.pruners.random import generators

LLOYD_ROUNDS = 30


def random_groups(tokens: VisualTokens, groups: int, seed: int) -> Tensor:
    """[B, N, groups] 1 in the group of a token, else 0: shuffled tokens, dealt out one by one.

    Sizes differ by at most 1. Every row has a shuffle of its own, as in `random`.
    """
    count = tokens.shape[1]
    rows = [torch.randperm(count, generator=one) for one in generators(seed, tokens)]
    return one_hot(torch.stack(rows) % groups, groups).to(tokens.features)


def k_means_groups(x: Tensor, groups: int, seed: int) -> Tensor:
    """[B, N, groups] 1 in the group of a token of x [B, N, C], its nearest mean, else 0.

    Lloyd, "Least squares quantization in PCM", 1982, with `LLOYD_ROUNDS` rounds. The means start at
    distinct tokens; one draw from the seed decides their places for the whole batch. A mean that
    loses all its tokens stays where it is. Ties go to the lower group.
    """
    draw = torch.Generator().manual_seed(seed)
    means = x[:, torch.randperm(x.shape[1], generator=draw)[:groups].to(x.device)]
    member = _nearest(x, means)
    for _ in range(LLOYD_ROUNDS):
        size = member.sum(1)[..., None]
        means = torch.where(size > 0, member.transpose(1, 2) @ x / size.clamp_min(1), means)
        member = _nearest(x, means)
    return member


def k_means_flops(tokens: int, width: int, groups: float) -> float:
    """FLOPs of `k_means_groups` for one image: distances, and in every round sums and distances."""
    return 2 * tokens * width * groups * (1 + 2 * LLOYD_ROUNDS)


def _nearest(x: Tensor, means: Tensor) -> Tensor:
    # the squared norm of a token is the same for all means, and left out
    distance = means.square().sum(2)[:, None] - 2 * x @ means.transpose(1, 2)
    return one_hot(distance.argmin(2), means.shape[1]).to(x)


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


def group_quotas(size: Tensor, survivors: Tensor, patches: int, keep: int, capped: bool) -> Tensor:
    """[B, groups] tokens that PruneSID keeps of each group, in sum `patches`.

    In proportion to the survivors of the suppression. Capped: at least 1 of every group that has
    tokens, and at most 5 * ceil(keep / 64) or the survivors, unless the caps hold less than `keep`.

    Args:
        size: [B, groups] tokens of each group.
        survivors: [B, groups] tokens of each group that the suppression leaves.
    """
    share = survivors / survivors.sum(1, keepdim=True).clamp_min(1)
    if not capped:
        upper = size
        quota = largest_remainder(share, patches).minimum(upper)
    else:
        lower = size.clamp_max(1)
        other = (patches - lower.sum(1, keepdim=True)).clamp_min(0)
        upper = survivors.clamp_max(5 * ceil(keep / 64))
        raised = torch.minimum(
            upper[:, None] + torch.arange(keep + 1, device=size.device)[:, None], size[:, None]
        )
        # all caps rise together until they hold the budget
        lift = (raised.sum(2) < keep).sum(1)
        upper = raised.gather(1, lift[:, None, None].expand_as(upper[:, None]))[:, 0]
        # rounding the running sum, in the precision of the released code, decides exact halves
        steps = (share.double().cumsum(1).float() * other).round().long()
        quota = (steps.diff(dim=1, prepend=torch.zeros_like(other)) + lower).minimum(upper)
    # what is left goes to the groups with most survivors
    visit = top_k(survivors, size.shape[1])
    room = (upper - quota).gather(1, visit)
    missing = patches - quota.sum(1, keepdim=True) - (room.cumsum(1) - room)
    return quota.scatter_add(1, visit, missing.clamp_min(0).minimum(room))
