"""PACT's selection, written from the paper and the released settings: one prompt, token by token.

Dhouib et al., arXiv 2504.08966. Tensors only hold single vectors; lists and loops do the rest.
"""

import math
from typing import Any

import torch
from torch import Tensor


def importance(t: Any) -> list[float]:
    """One number per visual token, of a prompt t (LayerTokens of one row)."""
    last = int(t.visual[0, -1])
    heads, groups = t.next_queries.shape[1], t.next_keys.shape[1]
    received = torch.zeros(last + 1)
    for head in range(heads):
        query = t.next_queries[0, head, : last + 1].mean(0)
        keys = t.next_keys[0, head * groups // heads, : last + 1]
        scores = torch.stack([query @ key / math.sqrt(len(key)) for key in keys])
        received += scores.softmax(0) / heads
    return [float(received[p] * t.hidden[0, p].norm()) for p in t.visual[0].tolist()]


def cosine_distance(a: Tensor, b: Tensor) -> float:
    return float(1 - a @ b / (a.norm() * b.norm()))


def pact(
    t: Any, keep: int, cutoff: float, recovery: float
) -> tuple[list[int], list[int], list[Tensor]]:
    """Centres ascending, the sizes of their clusters, and the means of their states."""
    count, scores = t.visual.shape[1], importance(t)
    places = t.visual[0].tolist()
    kept = sorted(range(count), key=lambda i: (-scores[i], i))[:keep]
    keys = [t.next_rotated_keys[0, :, place].flatten() for place in places]
    density = {
        i: sum(math.exp(-((cosine_distance(keys[i], keys[j]) / 2) ** 2)) for j in kept if j != i)
        for i in kept
    }
    centres: list[int] = []
    for i in sorted(kept, key=lambda i: -density[i]):
        if all(cosine_distance(keys[i], keys[centre]) > cutoff for centre in centres):
            centres.append(i)
    centres.sort()
    clusters: dict[int, list[int]] = {centre: [centre] for centre in centres}
    for i in range(count):
        if i not in clusters:
            distance = {centre: cosine_distance(keys[i], keys[centre]) for centre in centres}
            nearest = min(centres, key=lambda centre: distance[centre])
            if i in kept or distance[nearest] <= recovery * cutoff:
                clusters[nearest].append(i)
    means = [
        torch.stack([t.hidden[0, places[i]] for i in clusters[centre]]).mean(0)
        for centre in centres
    ]
    return centres, [len(clusters[centre]) for centre in centres], means
