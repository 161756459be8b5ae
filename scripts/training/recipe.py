"""The settings of the embedded model's training, and its optimizers."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import get_wsd_schedule


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, apart from library versions and the machine."""

    seed: int = 0
    scenes: int = 12_000
    tower_steps: int = 900
    tower_batch: int = 32
    tower_lr: float = 2e-3
    tower_muon_lr: float = 0.02  # of the matrices of transformer blocks; all else has AdamW
    align_steps: int = 400
    align_lr: float = 1e-2
    shown_scenes: int = 1500  # from which the projector's targets are taken
    steps: int = 1230
    decay_steps: int = 330  # the last ones, of falling learning rates
    batch: int = 16  # scenes
    lr: float = 1e-3
    muon_lr: float = 0.01
    warmup: int = 20
    keep_all: float = 0.2  # share of batches that keep all visual tokens
    keep_least: float = 0.05  # the others keep this share or more, log-uniform
    vocabulary: int = 2048  # an upper limit: merging ends when every word is one token


class Stepper:
    """Steps of Muon for the matrices of transformer blocks and of AdamW for all else.

    Args:
        named: parameters and their names.
        rates: learning rates of Muon and AdamW.
        warmup: steps of rising rates.
        decay: steps of falling rates, at the end.
        steps: all steps.
    """

    def __init__(
        self,
        named: list[tuple[str, nn.Parameter]],
        rates: tuple[float, float],
        warmup: int,
        decay: int,
        steps: int,
    ) -> None:
        self.parameters = [p for _, p in named]
        matrices = [p for name, p in named if p.dim() == 2 and ".layers." in name]
        others = [p for name, p in named if p.dim() != 2 or ".layers." not in name]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=rates[1], weight_decay=0.01, betas=(0.9, 0.98))
        ]
        if matrices:
            self.optimizers.append(torch.optim.Muon(matrices, lr=rates[0], weight_decay=0.01))
        self.schedules = [
            get_wsd_schedule(optimizer, warmup, decay, num_training_steps=steps)
            for optimizer in self.optimizers
        ]

    def __call__(self, loss: Tensor) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for stepping in (*self.optimizers, *self.schedules):
            stepping.step()
