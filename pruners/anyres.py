"""Order of the kept tokens of LLaVA-NeXT tiles in the sequence the LLM receives."""

from typing import Literal

import torch
from torch import Tensor

from pruners.base import EXTRA


def mosaic_order(
    kept: Tensor, tiles: tuple[int, int], grid: tuple[int, int], placement: Literal["correct", "prunesid"] = "correct"
) -> Tensor:
    """[T, K] kept patches of each tile -> order [T * K] in which their flattened rows are read.

    Patches follow the raster of the whole mosaic, row by row across adjacent tiles; EXTRA tokens (CLS) come last, by tile.

    Args:
        kept: patch indices per tile, tiles row by row, in the order of the features; EXTRA only in front.
        tiles: (rows, columns) of tiles.
        grid: (rows, columns) of patches in a tile.
        placement: `correct`, or as PruneSID's released code, which puts the features of a tile in their own order into the
            places of the sorted indices, so that a tile whose tokens do not ascend is scrambled.
    """
    place = kept.sort(1).values if placement == "prunesid" else kept
    tile = torch.arange(len(kept), device=kept.device)[:, None]
    row = tile // tiles[1] * grid[0] + place // grid[1]
    column = tile % tiles[1] * grid[1] + place % grid[1]
    end = tiles[0] * tiles[1] * grid[0] * grid[1]
    raster = torch.where(place == EXTRA, end + tile, row * tiles[1] * grid[1] + column)
    return raster.flatten().argsort(stable=True)
