"""The prompt of a batch as it stands between two cuts inside the language model."""

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.pruners.base import EXTRA


@dataclass(frozen=True)
class Frame:
    """The prompt as a stretch of layers sees it: B rows of L positions, n of them visual tokens."""

    visual: Tensor  # [B, n] positions of the visual tokens, ascending
    tokens: Tensor  # [B, n] which of the prompt's visual tokens they are; EXTRA: merged
    places: Tensor  # [B, L] positions in the unpruned prompt; merged tokens have that of the last visual token they met
    columns: Tensor  # [B, L] positions in the unpruned prompt whose rows and columns of its mask they take, ascending
    real: Tensor  # [B, L] False at padding
    text: Tensor  # [B, L] True at real positions behind the last image
    asked: Tensor  # [B, L] True where the pruner wants the attention

    @property
    def counted(self) -> Tensor:
        """[B, L] the real positions numbered through."""
        return (self.real.cumsum(1) - 1).clamp_min(0)

    def cut(self, chosen: Tensor) -> tuple["Frame", Tensor]:
        """The frame behind a choice [B, k] of visual tokens, and [B, L-n+k], the position each of its positions was.

        Merged tokens stand behind the last image and the kept ones, and were the last visual token.
        """
        length, count = self.real.shape[1], self.visual.shape[1]
        merged, index = chosen == EXTRA, chosen.clamp_min(0)
        stays = torch.ones_like(self.real).scatter(1, self.visual, False)
        others = stays.sort(dim=1, descending=True, stable=True).indices[:, : length - count]
        taken = torch.where(merged, self.visual[:, -1:], self.visual.gather(1, index))
        source, item = torch.cat([others, taken], 1).sort(dim=1, stable=True)
        # a mask knows order and padding only: where merged tokens share a position, what stands before gives way to the left
        step = torch.arange(source.shape[1], device=source.device)
        own = (source - step).flip(1).cummin(1).values.flip(1) + step
        frame = Frame(
            visual=item.argsort(1)[:, length - count :],
            tokens=torch.where(merged, EXTRA, self.tokens.gather(1, index)),
            places=self.places.gather(1, source),
            columns=self.columns.gather(1, own),
            real=self.real.gather(1, own),
            text=self.text.gather(1, own),
            asked=self.asked.gather(1, own),
        )
        return frame, source


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """[B, L, ...] -> [B, K, ...]: the positions `index` [B, K] of every row."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]
