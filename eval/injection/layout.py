"""Where the visual tokens of an image stand: in its crops, and in the prompt."""

from dataclasses import dataclass

import torch
from torch import Tensor

NEWLINE = (
    -1
)  # a placeholder that holds no token of the image, but the embedding that ends a row of tiles


@dataclass(frozen=True)
class EncodedImage:
    """One image behind the encoder: what was captured of its crops, and which of their tokens the prompt has places for.

    Token t of crop c has number c * N + t. The first crop of several is the whole image, the others tile it.
    """

    captures: dict[str, Tensor]  # [crops, N, ...], as VisualTokens defines them
    grid: tuple[int, int]  # (rows, columns) of a crop, rows * columns = N
    crops: int
    tokens: Tensor  # [P] number of the token each placeholder holds, or NEWLINE

    @property
    def per_crop(self) -> int:
        """N, the tokens of a crop."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class PlacedImage(EncodedImage):
    """An image with its places in the prompts of a call."""

    row: int  # prompt of the batch
    places: Tensor  # [P] positions in that prompt, ascending
    number: int  # which image of that prompt it is

    def slots(self) -> Tensor:
        """[crops * N] which placeholder holds each token; -1 where none does (tokens of padding, in layout `anyres`)."""
        where = torch.full((self.crops * self.per_crop,), -1, device=self.tokens.device)
        real = (self.tokens != NEWLINE).nonzero()[:, 0]
        where[self.tokens[real]] = real
        return where

    def newlines(self, kept: Tensor) -> Tensor:
        """The placeholders of newlines whose row of tiles still holds one of the kept tokens (numbers, [K])."""
        newline = self.tokens == NEWLINE
        line = newline.cumsum(0) - newline.long()  # the newline that ends each placeholder's row
        first = self.per_crop if self.crops > 1 else 0  # the base crop stands in front of the rows
        slots = self.slots()[kept[kept >= first]]
        alive = torch.zeros(int(newline.sum()) + 1, dtype=torch.bool, device=newline.device)
        alive[line[slots[slots >= 0]]] = True
        return (newline & alive[line]).nonzero()[:, 0]


def place(images: list[EncodedImage], visual: Tensor) -> list[PlacedImage]:
    """Give the images of a call, in order, their placeholders; `visual` [B, L] is True at placeholders.

    Raises:
        ValueError: placeholders and images do not match.
    """
    rows, positions = visual.nonzero(as_tuple=True)
    sizes = [len(image.tokens) for image in images]
    if sum(sizes) != len(positions):
        if not images:
            raise ValueError(
                f"the prompt has {len(positions)} image placeholders, but no image was encoded inside this block "
                "(the literal text of a placeholder in a question counts as one; with use_cache=False the prompt comes again "
                "at every step, without its image)"
            )
        raise ValueError(
            f"{len(positions)} image placeholders for images of {', '.join(map(str, sizes))} tokens (beam search, or several "
            "answers a prompt, repeat the prompt without its image: generate one answer a prompt)"
        )
    placed: list[PlacedImage] = []
    for image, row, places in zip(images, rows.split(sizes), positions.split(sizes), strict=True):
        owner = int(row[0])
        if bool((row != owner).any()):
            raise ValueError(
                "the placeholders of an image are spread over several prompts of the batch"
            )
        number = sum(other.row == owner for other in placed)
        placed.append(PlacedImage(**vars(image), row=owner, places=places, number=number))
    return placed
