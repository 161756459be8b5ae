"""Made-up inputs of pruners with every capture filled."""

import dataclasses
import typing

import torch

from secateur.pruners.base import VisualTokens
from secateur.pruners.in_llm import LayerTokens

KINDS = ("gauss", "clusters", "duplicates", "identical", "zero", "no_saliency")


def visual_tokens(
    batch: int,
    grid: tuple[int, int],
    *,
    seed: int = 0,
    width: int = 16,
    heads: int = 2,
    text: int = 3,
    kind: str = "gauss",
) -> VisualTokens:
    """B rows of rows x columns tokens with all captures; `kind` is one of KINDS."""
    generator = torch.Generator().manual_seed(seed)
    count = grid[0] * grid[1]

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def tokens(rows: int, size: int) -> torch.Tensor:
        x = draw(batch, rows, size)
        if kind == "clusters":
            x = x * 0.1 + draw(batch, 3, size)[:, torch.arange(rows) % 3]
        if kind == "duplicates":
            x = x[:, torch.arange(rows) // 2]
        if kind == "identical":
            x = x[:, :1].repeat(1, rows, 1)
        return torch.zeros_like(x) if kind == "zero" else x

    saliency = (2 * draw(batch, heads, 1 + count)).softmax(2)[..., 1:]
    return VisualTokens(
        features=tokens(count, width),
        grid=grid,
        encoder_features=tokens(count, width),
        cls_token=draw(batch, width),
        saliency=torch.zeros_like(saliency) if kind == "no_saliency" else saliency,
        object_attention=draw(batch, count).softmax(1),
        output_attention=draw(batch, count).softmax(1),
        encoder_keys=tokens(1 + count, 2 * heads),
        last_queries=draw(batch, 1 + count, width),
        last_keys=tokens(1 + count, width),
        text_embeddings=draw(batch, text, width),
        text_mask=torch.ones(batch, text, dtype=torch.bool),
        clip_patches=tokens(count, width),
        clip_text=draw(batch, min(text, 2), width),
        relevance=draw(batch, count),
        first_saliency=draw(batch, heads, 1 + count).softmax(2)[..., 1:],
        output_places=merged_places(batch, count, generator),
        sample_ids=tuple(f"document|{row}" for row in range(batch)),
    )


def merged_places(batch: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Output places of an encoder that merged all but a quarter of the patches away."""
    left = max(1, count // 4)
    remaining = torch.rand(batch, count, generator=generator).argsort(1)[:, :left]
    places = torch.arange(float(left)).expand(batch, -1)
    return torch.full((batch, count), -1.0).scatter(1, remaining, places)


def layer_tokens(
    batch: int, count: int, *, seed: int = 0, width: int = 16, kind: str = "gauss"
) -> LayerTokens:
    """B prompts of 3 positions, `count` visual tokens and 6 text positions.

    There are 2 heads and 2 query positions, of which one is padding.
    """
    states = visual_tokens(batch, (1, count + 9), seed=seed, width=width, kind=kind)
    length, heads = count + 9, 2
    assert states.encoder_features is not None
    rotated = states.encoder_features.unflatten(2, (heads, -1)).transpose(1, 2)
    generator = torch.Generator().manual_seed(seed)
    attention = torch.randn(batch, heads, 2, length, generator=generator).softmax(3)
    keys = torch.randn(batch, heads, length, width // 2, generator=generator)
    return LayerTokens(
        visual=torch.arange(3, 3 + count).repeat(batch, 1),
        text=(torch.arange(length) >= 3 + count).repeat(batch, 1),
        hidden=states.features,
        attention=torch.zeros_like(attention) if kind == "no_saliency" else attention,
        query_mask=torch.tensor([[True, False]]).repeat(batch, 1),
        keys=torch.zeros_like(keys) if kind == "zero" else keys,
        next_queries=torch.randn(batch, heads, length, width // 2, generator=generator),
        next_keys=torch.zeros_like(keys) if kind == "zero" else keys + 1,
        next_rotated_keys=rotated.contiguous(),
    )


def rows_of(tokens: VisualTokens | LayerTokens, rows: list[int]) -> typing.Any:
    """The same with some rows only."""
    values = {field.name: getattr(tokens, field.name) for field in dataclasses.fields(tokens)}
    picked: dict[str, typing.Any] = {
        name: value[rows] for name, value in values.items() if isinstance(value, torch.Tensor)
    }
    if values.get("sample_ids"):
        picked["sample_ids"] = tuple(values["sample_ids"][row] for row in rows)
    return dataclasses.replace(tokens, **picked)


def joined(rows: list[typing.Any]) -> typing.Any:
    """One batch of inputs of one row each."""
    parts: dict[str, typing.Any] = {
        field.name: torch.cat([getattr(row, field.name) for row in rows])
        for field in dataclasses.fields(rows[0])
        if isinstance(getattr(rows[0], field.name), torch.Tensor)
    }
    if isinstance(rows[0], VisualTokens):
        parts["sample_ids"] = tuple(f"document|{row}" for row in range(len(rows)))
    return dataclasses.replace(rows[0], **parts)
