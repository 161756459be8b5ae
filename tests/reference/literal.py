"""The methods step by step: one image, no batching, nothing reused between steps.

What the pruners are measured against, and a second opinion on their indices. Each step is one
tensor expression where the method's description states it as one, as released code does: all tokens
of a pick, all earlier columns of a Cholesky step, all text segments. Picks, rounds, groups, merge
centres and merges are plain loops. Where a description carries a running value from pick to pick,
so does the function; where it takes an extreme over all picks, that is taken anew. Default
hyper-parameters, and for PruneSID those of its ablations; each function takes one image
(VisualTokens of one row) and returns the indices in the order of Selection.indices.
"""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from secateur.pruners.base import EXTRA

Image = Any  # VisualTokens of one row with what the method needs
Literal = Callable[[Image, int], list[int]]


def unit(x: Tensor, eps: float = 1e-12) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp_min(eps)


def ranked(scores: Tensor, k: int) -> list[int]:
    """The k largest, ties to the lower index."""
    return scores.sort(descending=True, stable=True).indices[:k].tolist()


def rest(count: int, taken: list[int]) -> list[int]:
    gone = set(taken)
    return [i for i in range(count) if i not in gone]


def min_max(x: Tensor) -> Tensor:
    return (x - x.min()) / (x.max() - x.min() + 1e-6)


def dpp(kernel: Tensor, k: int, first: int | None = None, floor: float = 0.0) -> list[int]:
    """Greedy MAP: residuals shrink by the square of each new Cholesky column."""
    residual = kernel.diagonal().clone()
    columns = torch.zeros(k, len(kernel), device=kernel.device)
    picks: list[int] = []
    for t in range(k):
        j = first if t == 0 and first is not None else int(residual.argmax())
        columns[t] = (kernel[j] - columns[:t, j] @ columns[:t]) / residual[j].clamp_min(
            floor
        ).sqrt()
        residual = residual - columns[t] ** 2
        picks.append(j)
        residual[picks] = -torch.inf
    return picks


def fastervlm(t: Image, keep: int) -> list[int]:
    return sorted(ranked(t.saliency[0].mean(0), keep))


def scope(t: Image, keep: int) -> list[int]:
    y = unit(t.encoder_features[0])
    similarity, weights = y @ y.T, t.saliency[0].sum(0)
    cover = torch.zeros(len(y), device=y.device)
    picks: list[int] = []
    for _ in range(keep):
        gain = (similarity - cover[:, None]).clamp_min(0).sum(0)
        score = gain * weights
        score[picks] = -torch.inf
        picks.append(int(score.argmax()))
        cover = torch.maximum(cover, similarity[picks[-1]])
    return sorted(picks)


def divprune(t: Image, keep: int) -> list[int]:
    u = unit(t.features[0])
    distance = 1 - u @ u.T
    picks = [int(distance.topk(2, dim=0, largest=False).values[1].argmax())]
    while len(picks) < keep:
        nearest = distance[picks].amin(0)
        nearest[picks] = -torch.inf
        picks.append(int(nearest.argmax()))
    return sorted(picks)


def cdpruner(t: Image, keep: int) -> list[int]:
    u = unit(t.features[0])
    raw = -(unit(t.clip_patches[0]) @ unit(t.clip_text[0]).T).mean(1)
    relevance = (raw - raw.min() + 1e-6) / (raw.max() - raw.min())
    return sorted(dpp(relevance[:, None] * (u @ u.T) * relevance, keep))


def promprune(t: Image, keep: int) -> list[int]:
    e, saliency = t.features[0], t.saliency[0].mean(0)
    count, width = e.shape
    z = unit(e, 1e-8)
    z = z - z.mean(0)
    spectrum = torch.linalg.eigvalsh(z @ z.T if count <= width else z.T @ z).clamp_min(1e-12)
    p = spectrum / spectrum.sum()
    entropy = -(p * p.log()).sum() / math.log(min(count, width))
    share = 1 - torch.sigmoid(((entropy - 0.42) / 0.02).clamp(-20, 20))
    salient = ranked(saliency, int((share * keep).round()))
    others = rest(count, salient)
    f = unit(e, 1e-6)
    first = int((f[others] @ f[salient].T).amax(1).argmin()) if salient else 0
    picks = (
        dpp(f[others] @ f[others].T, keep - len(salient), first, floor=1e-8)
        if keep > len(salient)
        else []
    )
    return sorted(salient + [others[i] for i in picks])


def zspaprune(t: Image, keep: int) -> list[int]:
    v, text = t.features[0], t.text_embeddings[0].mean(0)
    score = unit(v) @ unit(text)
    picks = ranked(score, min(max(math.floor(0.6 * keep + 0.5), 1), keep))
    u = unit(v)
    nearest = (u @ u[picks].T).amax(1)
    while len(picks) < keep:
        nearest[picks] = torch.inf
        picks.append(int(nearest.argmin()))
        nearest = torch.maximum(nearest, u @ u[picks[-1]])
    return sorted(picks)


def trimtokenator(t: Image, keep: int) -> list[int]:
    v, text = t.features[0], t.text_embeddings[0]
    alignment = -torch.stack([(v - e).square().sum(1) for e in text]).mean(0)
    stage = ranked(alignment, max(int(0.8 * len(v)), keep))
    u = unit(v[stage], 1e-8)
    similarity = u @ u.T
    picks = [int(similarity.mean(1).argmin())]
    while len(picks) < keep:
        mean = similarity[:, picks].mean(1)
        mean[picks] = torch.inf
        picks.append(int(mean.argmin()))
    return sorted(stage[i] for i in picks)


def fsr(t: Image, keep: int) -> list[int]:
    v = t.encoder_features[0]
    relevance = min_max((unit(t.clip_patches[0]) @ unit(t.clip_text[0]).T).mean(1))
    phi = relevance**3 * min_max(t.saliency[0].mean(0))
    total = 0.0
    picks: list[int] = []
    for i in ranked(phi, keep):
        if picks and total >= 0.9 * float(phi.double().sum()):
            break
        picks.append(i)
        total += float(phi[i].double())
    u, focus = unit(v), len(picks)
    cosine = u @ u.T
    while len(picks) < keep:
        gap = (1 - cosine[picks]).amin(0)
        gap[picks] = -torch.inf
        picks.append(int(gap.argmax()))
    anchors, dropped = sorted(picks[focus:]), rest(len(v), picks)
    merge(v, cosine[dropped][:, anchors], anchors, dropped, phi + 1e-12)
    return sorted(picks)


def sppruner(t: Image, keep: int) -> list[int]:
    v, width = t.features[0], t.grid[1]
    a = min_max(t.saliency[0].mean(0))
    r = min_max(-(unit(t.clip_patches[0]) @ unit(t.clip_text[0]).T).mean(1))
    phi = 0.5 * a + 0.5 * r + a * r
    picks = ranked(phi, min(keep, max(1, math.floor(0.5 * keep + 0.5))))
    cell = torch.arange(len(v), device=v.device)
    down, across = cell // width, cell % width
    steps = torch.maximum((down[:, None] - down).abs(), (across[:, None] - across).abs())
    around = (steps == 1).float()
    context = (around @ phi) / around.sum(1).clamp_min(1)
    u, focus, worth = unit(v), len(picks), 1 + min_max(context)
    nearest = (u @ u[picks].T).amax(1)
    while len(picks) < keep:
        gain = (1 - nearest).clamp_min(0) * worth
        gain[picks] = -torch.inf
        picks.append(int(gain.argmax()))
        nearest = torch.maximum(nearest, u @ u[picks[-1]])
    anchors, dropped = sorted(picks[focus:]), rest(len(v), picks)
    cosine = (u[dropped] @ u[anchors].T).masked_fill(steps[dropped][:, anchors] > 3, -torch.inf)
    merge(v, cosine, anchors, dropped, phi + 1e-6)
    return sorted(picks)


def merge(
    v: Tensor, cosine: Tensor, anchors: list[int], dropped: list[int], weights: Tensor
) -> Tensor:
    """Weighted means of anchors and as many dropped tokens of largest cosine [dropped, anchors]."""
    if not anchors:
        return v[:0]
    best, slot = (x.tolist() for x in cosine.max(1))
    near = sorted(
        (-c, token, anchors[s])
        for c, token, s in zip(best, dropped, slot, strict=True)
        if c > -math.inf
    )
    total, weight = {a: weights[a] * v[a] for a in anchors}, {a: weights[a] for a in anchors}
    for _, token, anchor in near[: len(anchors)]:
        total[anchor] = total[anchor] + weights[token] * v[token]
        weight[anchor] = weight[anchor] + weights[token]
    return torch.stack([total[a] / weight[a] for a in anchors])


def prunesid(
    t: Image,
    keep: int,
    *,
    grouping: str = "psca",
    groups: int | None = None,
    score: str = "attention",
    nms: bool = True,
    alpha: float = 32,
    least_first: bool = False,
) -> list[int]:
    x = t.encoder_features[0]
    importance = t.saliency[0].sum(0) if score == "attention" else x.square().sum(1).sqrt()
    count, patches = len(x), keep - 1
    groups = groups or min(max(keep // 4, 1), *x.shape)
    by = {"psca": _principal_components, "kmeans": _k_means, "random": _shuffled}
    group = by[grouping](t, groups)
    y = unit(x)
    similarity = y @ y.T
    rho = (similarity.sum() - similarity.trace()) / (count * (count - 1))
    threshold = keep / alpha * rho
    priority = -importance if least_first else importance
    ranking, kept = [], []
    for g in range(groups):
        live = (group == g) & (importance > 0)
        survivors: list[int] = []
        while live.any():
            top = int(priority.masked_fill(~live, -torch.inf).argmax())
            survivors.append(top)
            live[top] = False
            if nms:
                live &= similarity[top] <= threshold
        suppressed = (group == g).index_fill(
            0, torch.tensor(survivors, dtype=torch.long, device=x.device), False
        )
        gone = ranked(priority.masked_fill(~suppressed, -torch.inf), int(suppressed.sum()))
        ranking.append(survivors + gone)
        kept.append(len(survivors))
    size = [len(r) for r in ranking]
    lower = [min(1, s) for s in size]
    upper = [min(5 * math.ceil(keep / 64), s, n) for s, n in zip(size, kept, strict=True)]
    while sum(upper) < keep:
        upper = [min(u + 1, s) for u, s in zip(upper, size, strict=True)]
    other = max(0, patches - sum(lower))
    share = torch.tensor(kept, dtype=torch.float32) / sum(kept)
    steps = (share.cumsum(0) * other).round().long().tolist()
    quota = [
        min(b - a + low, u) for a, b, low, u in zip([0, *steps], steps, lower, upper, strict=False)
    ]
    for g in sorted(range(groups), key=lambda g: (-kept[g], g)):
        quota[g] += min(upper[g] - quota[g], other + sum(lower) - sum(quota))
    return [EXTRA, *sorted(i for r, n in zip(ranking, quota, strict=True) for i in r[:n])]


def _principal_components(t: Image, groups: int) -> Tensor:
    x = t.encoder_features[0]
    m = x.sigmoid().T
    m = m - m.mean(0)
    wide = m.shape[0] < m.shape[1]
    a = m.T if wide else m
    q = torch.linalg.qr(
        a @ torch.randn(a.shape[1], groups, generator=torch.Generator().manual_seed(0)).to(x.device)
    ).Q
    for _ in range(2):
        q = torch.linalg.qr(a.T @ q).Q
        q = torch.linalg.qr(a @ q).Q
    left, _, right = torch.linalg.svd(q.T @ a, full_matrices=False)
    return (q @ left if wide else right.T).abs().argmax(1)


def _k_means(t: Image, groups: int) -> Tensor:
    x = t.encoder_features[0]
    start = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    means = [x[i] for i in start[:groups].tolist()]
    for last in [False] * 30 + [True]:
        group = torch.stack([(x - mean).square().sum(1) for mean in means]).argmin(0)
        for g in range(0 if last else groups):
            if (group == g).any():
                means[g] = x[group == g].mean(0)
    return group


def _shuffled(t: Image, groups: int) -> Tensor:
    digest = hashlib.sha256(f"0|{t.sample_ids[0]}".encode()).digest()
    draw = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
    return torch.randperm(t.shape[1], generator=draw) % groups


def visionzip(t: Image, keep: int) -> list[int]:
    x, heads = t.encoder_features[0], t.saliency.shape[1]
    context = math.floor(keep * 5 / 32 + 0.5)
    dominant = sorted(ranked(t.saliency[0].sum(0), keep - context - 1))
    others = rest(len(x), dominant)
    step = max(1, len(others) // context)
    targets = others[::step][:context]
    metric = unit(t.encoder_keys[0, 1:].view(len(x), heads, -1).mean(1))
    groups: dict[int, list[int]] = {target: [] for target in targets}
    joining = rest(len(x), dominant + targets)
    for token, slot in zip(
        joining, (metric[joining] @ metric[targets].T).argmax(1).tolist(), strict=True
    ):
        groups[targets[slot]].append(token)
    torch.stack(
        [x[target] + (x[group].mean(0) if group else 0) for target, group in groups.items()]
    )
    return [EXTRA, *dominant, *targets]


def vispruner(t: Image, keep: int) -> list[int]:
    u = unit(t.encoder_features[0])
    ranking = ranked(t.saliency[0].mean(0), len(u))
    important = int(keep * 0.5)
    kept, residual = ranking[:important], ranking[important:]
    while (drop := min(8, len(residual) - (keep - important))) > 0:
        even, odd = residual[0::2], residual[1::2]
        order = ranked((u[even] @ u[odd].T).amax(1), len(even))
        residual = [even[i] for i in order[drop:]] + odd
    return sorted(kept + residual)


def prumerge(t: Image, keep: int) -> list[int]:
    return _prumerge(t, ranked(_prumerge_attention(t), keep - 1))


def prumerge_plus(t: Image, keep: int) -> list[int]:
    top = ranked(_prumerge_attention(t), (keep - 1) // 2)
    free, even = rest(t.shape[1], top), keep - 1 - len(top)
    return _prumerge(t, top + [free[i * len(free) // even] for i in range(even)])


def _prumerge_attention(t: Image) -> Tensor:
    q, k = t.last_queries[0, :1], t.last_keys[0]
    return (q @ k.T * k.shape[1] ** -0.5).softmax(1)[0, 1:]


def _prumerge(t: Image, centres: list[int]) -> list[int]:
    f, a, u = t.encoder_features[0], _prumerge_attention(t), unit(t.last_keys[0, 1:])
    others, rows = rest(len(f), centres), []
    for i in centres:
        pool = [j for j in centres if j != i] + others
        near = [pool[j] for j in ranked((u @ u[i])[pool], 32)]
        rows.append(f[i] + (a[near, None] * f[near]).sum(0))
    rows.append((a[others, None] * f[others]).sum(0))
    torch.stack(rows)
    return [*centres, EXTRA]


def hired(t: Image, keep: int) -> list[int]:
    return sorted(ranked(t.saliency[0].sum(0), keep))


def hired_crops(
    t: Image, keep: int, content: str = "count", regions: str = "strips"
) -> list[list[int]]:
    """HiRED on the crops of one image, the rows of `t`: what each of them keeps."""
    tiles, count = t.shape[0] - 1, t.shape[1]
    budget = keep * (tiles + 1)
    whole = min(int(0.5 * budget), count)
    others = min(budget - whole, tiles * count)
    first, columns = t.first_saliency[0].sum(0), t.grid[1]
    marked = ranked(first, int(count * 0.5))
    score = torch.zeros(tiles)
    for i in range(count):
        if regions == "strips":
            region = i * tiles // count
        else:
            below, right = i // columns >= t.grid[0] / 2, i % columns >= columns / 2
            region = 2 * below + right
        if content == "attention":
            score[region] += first[i]
        elif i in marked:
            score[region] += 1
    counts = [whole, *(min(int(share * others), count) for share in score / score.sum())]
    return [
        sorted(ranked(saliency.sum(0), max(number, 1)))
        for saliency, number in zip(t.saliency, counts, strict=True)
    ]


def holov(
    t: Image,
    keep: int,
    bands: int | None = None,
    weight: float = 0.09,
    sharpness: float = 1.0,
    rank: str = "attention",
) -> list[int]:
    x, attention = t.features[0], t.saliency[0].mean(0)
    count = len(x)
    parts = max(1, int(1024 / 576 * count / keep)) if bands is None else bands
    groups: list[list[int]] = []
    for part in range(parts):
        start = sum(map(len, groups))
        size = count // parts + (part < count % parts)
        if size:
            groups.append(list(range(start, start + size)))
    scores, worth = torch.zeros(count), []
    for group in groups:
        if len(group) == 1:
            scores[group] = attention[group]
        else:
            z = x[group] / (x[group].norm(dim=1, keepdim=True) + 1e-6)
            s = z @ z.T
            s = s - torch.diag(s.diagonal())
            mean = s.sum(1) / (len(group) - 1)
            variance = ((s - mean[:, None]) ** 2).sum(1) / (len(group) - 1)
            a = 1000 * attention[group]
            scores[group] = a + weight * (a.mean() / (variance.mean() + 1e-6)) * variance
        worth.append(scores[group].mean() ** sharpness)
    share = torch.stack(worth) / (torch.stack(worth).sum() + 1e-6)
    quota = [int(part) for part in (share * keep).floor()]
    by_share = ranked(share, len(groups))
    for band in by_share[: keep - sum(quota)]:
        quota[band] += 1
    quota = [min(number, len(group)) for number, group in zip(quota, groups, strict=True)]
    for band in by_share:
        quota[band] += min(keep - sum(quota), len(groups[band]) - quota[band])
    order = attention if rank == "attention" else scores
    picks: list[int] = []
    for group, number in zip(groups, quota, strict=True):
        best = range(len(group)) if number == len(group) else ranked(order[group], number)
        picks += [group[i] for i in best]
    return picks


def trim(t: Image, keep: int, similarity: str = "dot") -> list[int]:
    nearness = trim_score(t, similarity)
    return [*sorted(ranked(nearness, keep - 1)), EXTRA]


def trim_adaptive(t: Image, similarity: str = "dot") -> list[int]:
    weight = trim_score(t, similarity).softmax(0)
    low, high = weight.quantile(0.25), weight.quantile(0.75)
    outliers = int((weight > high + 1.5 * (high - low)).sum())
    return [*sorted(ranked(weight, int(len(weight) * (outliers / len(weight))))), EXTRA]


def trim_score(t: Image, similarity: str) -> Tensor:
    patches, text = t.clip_patches[0], t.clip_text[0]
    if similarity == "cosine":
        patches, text = unit(patches), unit(text)
    return -torch.stack([patches @ segment for segment in text]).mean(0)


def hiprune(t: Image, keep: int) -> list[int]:
    count, width = t.shape[1], t.grid[1]
    first: set[int] = set()
    for anchor in ranked(t.object_attention[0], round(keep * 0.1 / 5)):
        first |= {min(max(anchor + shift, 0), count - 1) for shift in (0, -1, 1, -width, width)}
    output = t.output_attention[0].clone()
    output[sorted(first)] -= 1
    return sorted([*first, *ranked(output, keep - len(first))])


METHODS: dict[str, Literal] = {
    function.__name__: function
    for function in (
        cdpruner,
        divprune,
        fastervlm,
        fsr,
        hiprune,
        hired,
        holov,
        promprune,
        prumerge,
        prumerge_plus,
        prunesid,
        scope,
        sppruner,
        trim,
        trimtokenator,
        visionzip,
        vispruner,
        zspaprune,
    )
}
