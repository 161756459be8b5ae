"""Merging inside an image encoder, written from the paper: one crop, token by token.

Bolya et al., arXiv 2210.09461, Section 3. Nothing is shared with the pruner or its hooks: the
encoder's weights are used directly, sets are lists, and each token carries the patches it holds.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Token:
    state: Tensor  # [C]
    patches: set[int]  # empty for CLS
    place: int  # the patch that it is centred on; -1 for CLS

    @property
    def size(self) -> int:
        return max(1, len(self.patches))


def soft_matching(keys: list[Tensor], count: int) -> list[tuple[int, int]]:
    """The pairs (source, target) of token numbers that merge; token 0 is CLS."""
    unit = [key / key.norm() for key in keys]
    edges = []
    for source in range(2, len(keys), 2):  # CLS, at 0, is of the first set and never merges
        targets = range(1, len(keys), 2)
        similarity = {target: float(unit[source] @ unit[target]) for target in targets}
        target = max(targets, key=lambda number: (similarity[number], -number))
        edges.append((similarity[target], source, target))
    edges.sort(key=lambda edge: (-edge[0], edge[1]))
    return [(source, target) for _, source, target in edges[:count]]


def merge(tokens: list[Token], pairs: list[tuple[int, int]]) -> list[Token]:
    """The tokens after merging: what remains of the first set, then the second set."""
    sources = {source for source, _ in pairs}
    result = [token for number, token in enumerate(tokens[::2]) if 2 * number not in sources]
    for number in range(1, len(tokens), 2):
        group = [tokens[number]] + [tokens[source] for source, target in pairs if target == number]
        total = sum(token.size for token in group)
        state = sum((token.state * token.size for token in group), torch.zeros(())) / total
        patches = set().union(*(token.patches for token in group))
        result.append(Token(state, patches, tokens[number].place))
    return result


def attention(block: Any, tokens: list[Token], weighted: bool) -> tuple[Tensor, list[Tensor]]:
    """What attention adds to each token [T, C], and the mean over heads of each token's keys."""
    layer = block.self_attn
    normed = block.layer_norm1(torch.stack([token.state for token in tokens]))
    heads = layer.num_heads
    queries, keys, values = (
        part(normed).view(len(tokens), heads, -1)
        for part in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    mixed = torch.zeros_like(queries)
    for head in range(heads):
        scores = queries[:, head] @ keys[:, head].T / math.sqrt(queries.shape[-1])
        if weighted:
            scores = scores + torch.tensor([math.log(token.size) for token in tokens])
        mixed[:, head] = scores.softmax(1) @ values[:, head]
    return layer.out_proj(mixed.flatten(1)), list(keys.mean(1))


def encode(
    blocks: list[Any], states: Tensor, plan: list[int], weighted: bool = True
) -> list[Token]:
    """The tokens that leave `blocks`, CLS first, for states [1 + N, C] that enter them."""
    tokens = [
        Token(state, {number - 1} if number else set(), number - 1)
        for number, state in enumerate(states)
    ]
    for block, count in zip(blocks, plan, strict=True):
        added, keys = attention(block, tokens, weighted)
        for token, more in zip(tokens, added, strict=True):
            token.state = token.state + more
        if count:
            tokens = merge(tokens, soft_matching(keys, count))
        for token in tokens:
            token.state = token.state + block.mlp(block.layer_norm2(token.state))
    return tokens
