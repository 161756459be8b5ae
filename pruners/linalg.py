"""Textbook algorithms that methods share: float32, batched, without host synchronisation.

The one exception is `non_maximum_suppression`, whose number of rounds depends on the data.
"""

from collections.abc import Callable

import torch
from torch import Tensor

GRAM_BLOCK = 128  # tokens from which a Gram matrix is divided; 80..192 measure alike
# values of a temporary; the system allocates larger ones anew each time, page by page
CACHED = 2_000_000
RANK_TOLERANCE = 1e-6  # float32 rounding of a Cholesky residual, relative to the diagonal


def normalize(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Rows of x divided by max(norm, eps)."""
    return x / x.norm(dim=-1, keepdim=True).clamp_min(eps)


def cosine_gram(x: Tensor, eps: float = 1e-12) -> Tensor:
    """[B, N, D] -> cosine similarity of every pair of rows, [B, N, N], exactly symmetric."""
    gram = x.new_empty(*x.shape[:2], x.shape[1])
    together = len(x) if x.is_cuda else max(1, CACHED // x[0].numel())
    for images, part in zip(x.split(together), gram.split(together), strict=True):
        symmetric_gram(normalize(images, eps), part)
    return gram


def symmetric_gram(x: Tensor, out: Tensor | None = None) -> Tensor:
    """x x^T for x [B, N, D], exactly symmetric; computes each pair of halves once."""
    batch, count = x.shape[:2]
    gram = x.new_empty(batch, count, count) if out is None else out
    if count < GRAM_BLOCK:
        torch.bmm(x, x.transpose(1, 2), out=gram)
        return gram.tril_().add_(gram.tril(-1).transpose(1, 2))
    half = count // 2
    low, high = slice(half), slice(half, 2 * half)
    halves = symmetric_gram(x[:, : 2 * half].reshape(2 * batch, half, -1)).view(
        batch, 2, half, half
    )
    gram[:, low, low], gram[:, high, high] = halves.unbind(1)
    gram[:, high, low] = across = x[:, high] @ x[:, low].transpose(1, 2)
    gram[:, low, high] = across.transpose(1, 2)
    if count % 2:
        gram[:, :, -1:] = last = x @ x[:, -1:].transpose(1, 2)
        gram[:, -1:] = last.transpose(1, 2)
    return gram


def mean_similarity(similarity: Tensor) -> Tensor:
    """[B] mean over the pairs of different tokens, for similarity [B, N, N]."""
    count = similarity.shape[1]
    return (similarity.sum((1, 2)) - similarity.diagonal(dim1=1, dim2=2).sum(1)) / (
        count * (count - 1)
    )


def min_max(x: Tensor, eps: float = 1e-6) -> Tensor:
    """(x - min) / (max - min + eps) along the last axis."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    return (x - low) / (high - low + eps)


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest along the last axis, descending; equal scores by lower index.

    Rows with a NaN give index 0 k times over, which `Selection.check` refuses: asking here would
    make the device wait.
    """
    largest = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return (
        largest.masked_fill(scores.isnan().any(-1, keepdim=True), 0)
        if scores.is_floating_point()
        else largest
    )


def outlier_share(values: Tensor, image_of_row: tuple[int, ...] | None) -> Tensor:
    """[B] share, in float64, of values [B, N] far above the others, over all crops of an image.

    These exceed the upper quartile by more than 1.5 interquartile ranges.

    Args:
        image_of_row: the image of each row; None: every row is its own.
    """
    images = image_of_row or tuple(range(len(values)))
    share = torch.empty(len(values), dtype=torch.float64, device=values.device)
    for image in sorted(set(images)):
        rows = [row for row, owner in enumerate(images) if owner == image]
        mine = values[rows].flatten()
        low, high = mine.quantile(0.25), mine.quantile(0.75)
        share[rows] = (mine > high + 1.5 * (high - low)).sum().double() / mine.numel()
    return share


def evenly_spaced(count: int, k: int) -> Tensor:
    """k of 0..count-1, at the centres of equal intervals."""
    return (2 * torch.arange(k) + 1) * count // (2 * k)


def concatenate_rows(first: Tensor, count: Tensor, second: Tensor) -> Tensor:
    """Per row the first `count` [B] entries of `first` [B, k], then `second` [B, k]; cut to k."""
    place = torch.arange(first.shape[1], device=first.device).expand_as(first)
    after = place - count[:, None]
    return torch.where(after < 0, first, second.gather(1, after.clamp_min(0)))


def facility_location(
    similarity: Tensor, weights: Tensor, k: int, additive: bool = False
) -> Tensor:
    """Greedy weighted coverage: k picks [B, k] in the order taken, ties to the lower index.

    Each step takes the v of largest weights_v * gain_v (or gain_v + weights_v), where
    gain_v = sum_u max(0, similarity_uv - cover_u) and cover_u = max(0, similarity to the picks so
    far).

    A pick changes the terms of those u alone that it covers better, N / t of them on average at
    step t. On the CPU only these are exchanged, in float64; on a GPU, where reading which they are
    would stall every step, all terms are summed anew.

    Args:
        similarity: [B, N, N], symmetric.
        weights: [B, N].
    """
    batch, count = weights.shape
    rows = similarity.flatten(0, 1)
    start = torch.arange(batch, device=rows.device) * count
    cover = torch.zeros(batch * count, device=rows.device)
    taken = torch.zeros_like(weights)  # 0, -inf where taken
    gain = similarity.clamp_min(0).sum(2, dtype=torch.float64)
    picks = []
    for _ in range(k):
        score = (
            gain.float() + weights + taken
            if additive
            else torch.addcmul(taken, gain.float(), weights)
        )
        pick = score.argmax(1) + start
        picks.append(pick)
        taken.view(-1).index_fill_(0, pick, -torch.inf)
        near = rows.index_select(0, pick).view(-1)
        if rows.is_cuda:
            cover = torch.maximum(cover, near)
            gain = (
                (similarity - cover.view(batch, 1, count)).clamp_min_(0).sum(2, dtype=torch.float64)
            )
        else:
            _cover_better(gain, rows, cover, near)
    return torch.stack(picks, 1) - start[:, None]


def _cover_better(gain: Tensor, rows: Tensor, cover: Tensor, near: Tensor) -> None:
    """Raise `cover` to `near` where larger; subtract what is lost from `gain` [B, N]."""
    batch, count = gain.shape
    changed = (near > cover).nonzero()[:, 0]
    # few enough at a time for the temporaries to stay in the cache
    for part in changed.split(256) if len(changed) > 256 else (changed,):
        old, new = cover.index_select(0, part)[:, None], near.index_select(0, part)[:, None]
        lost = torch.clamp(rows.index_select(0, part), old, new).sub_(old).double()
        if batch == 1:
            gain -= lost.sum(0)
        else:
            gain.index_add_(0, part // count, lost, alpha=-1)
    torch.maximum(cover, near, out=cover)


def greedy_map(
    kernel: Tensor,
    k: int,
    free: Tensor | None = None,
    first: Tensor | None = None,
    fallback: Tensor | None = None,
) -> Tensor:
    """Greedy MAP of a determinantal point process by incremental Cholesky: picks [B, k] as taken.

    Each step takes the largest residual (squared distance to the span of the picks), ties to the
    lower index. Residuals below RANK_TOLERANCE of a token's own diagonal entry are rounding; once
    there are no others, the rank is exhausted and the rest follows by descending `fallback`.

    Args:
        kernel: [B, N, N], symmetric, positive semi-definite.
        free: [B, N] tokens that may be picked; None: all.
        first: [B] the first pick, if it is not the largest diagonal entry.
        fallback: [B, N]; None: by index.
    """
    batch, count = kernel.shape[:2]
    rows = kernel.flatten(0, 1)
    start = torch.arange(batch, device=rows.device) * count
    residual = kernel.diagonal(dim1=1, dim2=2).clone()
    rounding = RANK_TOLERANCE * residual.clamp_min(0)
    if free is not None:
        residual.masked_fill_(~free, -torch.inf)
    factor = kernel.new_zeros(k, batch * count)  # row t: column t of the Cholesky factors
    picks, pivots = [], []
    for t in range(k):
        residual.masked_fill_(residual <= rounding, -1.0)
        pivot, pick = residual.max(1)
        if t == 0 and first is not None:
            pick, pivot = first, residual.gather(1, first[:, None])[:, 0]
        pick = pick + start
        picks.append(pick)
        pivots.append(pivot)
        row = rows.index_select(0, pick)
        if t > 0:
            past = factor[:t]
            known = past.index_select(1, pick).t()[:, None]
            row = torch.baddbmm(
                row[:, None], known, past.view(t, batch, count).transpose(0, 1), alpha=-1
            )[:, 0]
        column = factor[t].view(batch, count)
        torch.mul(
            row, pivot.abs().rsqrt_()[:, None], out=column
        )  # below 0 nothing is left to divide by
        residual.addcmul_(column, column, value=-1).view(-1).index_fill_(0, pick, -torch.inf)
    order, alive = torch.stack(picks, 1) - start[:, None], torch.stack(pivots, 1) > 0
    if first is not None:
        alive[:, 0] = True
    taken = torch.zeros_like(residual).scatter_add_(1, order, alive.to(residual.dtype)) > 0
    blocked = taken if free is None else taken | ~free
    fallback = torch.zeros_like(residual) if fallback is None else fallback
    rest = top_k(fallback.masked_fill(blocked, -torch.inf), k)
    return concatenate_rows(order, alive.sum(1), rest)


def farthest_point(
    distance: Tensor,
    seeds: Tensor,
    k: int,
    seed_count: Tensor | None = None,
    update: Callable[[Tensor, Tensor], Tensor] = torch.minimum,
) -> Tensor:
    """Greedy dispersion: the seeds, then the farthest token from all picks so far.

    Returns k picks [B, k]; ties go to the lower index.

    Args:
        distance: [B, N, N], from a pick (row) to a candidate (column).
        seeds: [B, S] first picks, 1 <= S <= k.
        seed_count: [B] how many of its seeds (at least 1) a row uses; None: all.
        update: how distances to several picks combine: `torch.minimum` is the max-min rule,
            `torch.add` maximises the mean.
    """
    batch, count = distance.shape[:2]
    rows = distance.flatten(0, 1)
    start = torch.arange(batch, device=rows.device) * count
    seeds = seeds + start[:, None]
    taken = distance.new_zeros(batch, count)  # 0, -inf where taken
    gap, picks = distance, []
    for t in range(k):
        if t < seeds.shape[1] and (t == 0 or seed_count is None):
            pick = seeds[:, t]
        else:
            pick = (gap + taken).argmax(1) + start
            if seed_count is not None and t < seeds.shape[1]:
                pick = torch.where(seed_count > t, seeds[:, t], pick)
        picks.append(pick)
        taken.view(-1).index_fill_(0, pick, -torch.inf)
        near = rows.index_select(0, pick)
        gap = near if t == 0 else update(gap, near)
    return torch.stack(picks, 1) - start[:, None]


def most_isolated(distance: Tensor) -> Tensor:
    """[B] token with the farthest nearest neighbour, for distance [B, N, N]; ties: lower index."""
    own = distance.diagonal(dim1=1, dim2=2)
    before = own.clone()
    own.fill_(torch.inf)
    nearest = distance.amin(2)
    own.copy_(before)
    return nearest.argmax(1)


def non_maximum_suppression(suppresses: Tensor, candidates: Tensor) -> Tensor:
    """The candidates [B, N] that no surviving candidate suppresses.

    The sequential rule as a fixed point: each round settles at least the next link of every chain
    of suppressions, and the answer is unique because suppression only runs from higher to lower
    scores.

    Args:
        suppresses: [B, N, N] float, 1 where the row's token removes the column's. Without cycles.
        candidates: [B, N] bool.
    """
    kept = candidates
    while True:
        hit = torch.bmm(kept[:, None].to(suppresses.dtype), suppresses)[:, 0] > 0
        settled = candidates & ~hit
        if torch.equal(settled, kept):
            return kept
        kept = settled


def largest_remainder(share: Tensor, total: int) -> Tensor:
    """Integers [B, K] of sum `total`, nearest to share * total (Hamilton), for shares of sum 1."""
    exact = share * total
    whole = exact.floor().long()
    order = top_k(exact - whole, share.shape[-1])
    place = order.argsort(-1)
    return whole + (place < total - whole.sum(-1, keepdim=True)).long()


def principal_axes(x: Tensor, k: int, seed: int | None = None) -> Tensor:
    """The k leading right singular vectors of x [B, M, N] as columns [B, N, k].

    Args:
        seed: None for the exact vectors; else those of the randomised range finder of Halko et al.
            (arXiv 0909.4061, Algorithm 5.1) without oversampling, with two power iterations and one
            Gaussian test matrix for the whole batch, drawn on the CPU from a generator of its own.
    """
    if seed is None:
        return torch.linalg.eigh(symmetric_gram(x.transpose(1, 2))).eigenvectors[..., -k:].flip(-1)
    wide = x.shape[1] < x.shape[2]
    flat = x if wide else x.transpose(1, 2)
    test = torch.randn(flat.shape[1], k, generator=torch.Generator().manual_seed(seed)).to(x.device)
    basis = torch.linalg.qr((test.t() @ flat).transpose(1, 2)).Q
    for _ in range(2):
        basis = torch.linalg.qr(flat @ basis).Q
        basis = torch.linalg.qr((basis.transpose(1, 2) @ flat).transpose(1, 2)).Q
    left, _, right = torch.linalg.svd((flat @ basis).transpose(1, 2), full_matrices=False)
    return basis @ left if wide else right.transpose(1, 2)


def merge_into_anchors(
    features: Tensor,
    anchors: Tensor,
    affinity: Tensor,
    weights: Tensor,
    limit: Tensor | int,
    most: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted means of anchors and the dropped tokens nearest to them.

    Every token goes to its anchor of largest affinity (ties: first anchor); of all tokens the
    `limit` with the largest such affinity (ties: lower index) are merged, the others are lost.

    Args:
        features: [B, N, D].
        anchors: [B, K] token indices.
        affinity: [B, K, N] of anchor and token, -inf where they may not merge.
        weights: [B, N] positive.
        limit: how many tokens to merge at most, for all rows or per row [B].
        most: upper bound of limit.

    Returns:
        Anchor features [B, K, D] (untouched where nothing came in), the merged tokens [B, most] by
        descending affinity, with -1 after the last, and the places of their anchors in 0..K-1 [B,
        most].
    """
    best, nearest = affinity.max(1)
    source = top_k(best, most)
    slot = nearest.gather(1, source)
    place = torch.arange(source.shape[1], device=source.device)
    valid = (place < (limit[:, None] if isinstance(limit, Tensor) else limit)) & (
        best.gather(1, source) > -torch.inf
    )
    slots = torch.arange(anchors.shape[1], device=slot.device)[:, None]
    inflow = torch.where(
        (slot[:, None] == slots) & valid[:, None], weights.gather(1, source)[:, None], 0.0
    )  # [B, K, most]
    own = weights.gather(1, anchors)[..., None]
    kept = gather_rows(features, anchors)
    merged = (own * kept + inflow @ gather_rows(features, source)) / (
        own + inflow.sum(-1, keepdim=True)
    )
    touched = inflow.sum(-1, keepdim=True) > 0
    return torch.where(touched, merged, kept), source.masked_fill(~valid, -1), slot


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [B, K] of x [B, N, D]: [B, K, D]."""
    rows = index + torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(*index.shape, x.shape[-1])


def complement(index: Tensor, count: int) -> Tensor:
    """The count - K of 0..count-1 that are not among the distinct index [B, K], ascending."""
    absent = torch.ones(len(index), count, device=index.device).scatter_(1, index, 0)
    return top_k(absent, count - index.shape[1])
