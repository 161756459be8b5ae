"""Merging inside the image encoder, between the attention and the MLP of its blocks."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.budget import Budget
from secateur.families.base import Adapter
from secateur.families.contract import Arguments, ContractError, Keywords
from secateur.pruners.linalg import complement, gather_rows
from secateur.pruners.tower import Matching, TowerPruner


@dataclass
class _Image:
    """The image that is encoded now: R crops of T tokens, CLS first."""

    plan: list[int] = field(default_factory=list)  # tokens that each block merges away
    patches: int = 0  # of a crop, before merging
    sizes: Tensor | None = None  # [R, T] patches that a token stands for; None: all 1
    places: Tensor | None = None  # [R, T] place of a token among CLS and all patches
    keys: Tensor | None = None  # [R, T, C] of the block that runs now
    states: Tensor | None = None  # [R, T, C] between its attention and its MLP
    merged: Tensor | None = None  # [R, T', C] these states after merging
    added: Tensor | None = None  # [R, T', C] what the MLP adds to them
    output: Tensor | None = None  # [R, T', C] of the last block, if anything merged


class TowerMerging:
    """Hooks that merge tokens while one image is encoded.

    The projector then sees the remaining tokens alone. Its output gets one row for each patch
    again, with zeros for those that were merged away, because the model expects as many features
    as the prompt has placeholders.
    """

    def __init__(self, adapter: Adapter, pruner: TowerPruner, budget: Budget) -> None:
        self.pruner, self.budget = pruner, budget
        self.blocks, self.projector = adapter.tower_blocks(), adapter.projector
        self.arguments = Arguments(self.blocks[0].block.forward, "hidden_states", "attention_mask")
        self.now = _Image()
        self.checked = False  # whether an image has shown that the blocks are what hooks expect

    @contextlib.contextmanager
    def attached(self, into: dict[str, Tensor]) -> Iterator[None]:
        """Hooks in, hooks out; `into` gets `output_places` when the projector has run.

        The hooks come before others of the same modules, which then see what they return.
        """
        with contextlib.ExitStack() as stack:
            for handle in self._hooks(into):
                stack.callback(handle.remove)
            try:
                yield
            finally:
                self.now = _Image()

    def _hooks(self, into: dict[str, Tensor]) -> Iterator[RemovableHandle]:
        for number, parts in enumerate(self.blocks):
            yield parts.block.register_forward_pre_hook(
                partial(self._enter, number), with_kwargs=True
            )
            yield parts.keys.register_forward_hook(self._store_keys)
            yield parts.norm.register_forward_pre_hook(partial(self._merge, number, parts.heads))
            yield parts.mlp.register_forward_hook(partial(self._hold, number))
            yield parts.block.register_forward_hook(partial(self._leave, number), prepend=True)
        yield self.projector.register_forward_pre_hook(self._project)
        yield self.projector.register_forward_hook(partial(self._spread, into), prepend=True)

    def _start(self, hidden: Tensor) -> None:
        """Plan the merges of an image, by the states [R, 1 + N, C] that enter the first block."""
        crops, patches = hidden.shape[0], hidden.shape[1] - 1
        budgets = self.budget.of_crops(crops, patches)
        if len(set(budgets)) > 1:
            self.pruner.fail(
                f"budgets of {', '.join(map(str, budgets))} for the {crops} crops of an image: the "
                "image encoder runs on all of them together, so that their budgets must be equal; "
                f"give a multiple of {crops} tokens, or a budget per crop, such as "
                f"{budgets[-1]}/tile"
            )
        self.now = _Image(
            plan=self.pruner.merged_per_block(patches, len(self.blocks), budgets[0]),
            patches=patches,
            places=torch.arange(1 + patches, device=hidden.device).expand(crops, -1),
        )

    def _enter(
        self, number: int, _module: nn.Module, args: tuple[Any, ...], kwargs: Keywords
    ) -> tuple[tuple[Any, ...], Keywords] | None:
        arguments = self.arguments.read(args, kwargs)
        hidden = arguments.pop("hidden_states")
        if number == 0:
            self._start(hidden)
        if self.now.sizes is None or not self.pruner.weighs_attention:
            return None
        arguments["attention_mask"] = self.now.sizes.log().to(hidden.dtype)[:, None, None]
        return (hidden,), self.arguments.write(arguments)

    def _store_keys(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self.now.keys = output.detach()

    def _merge(
        self, number: int, heads: int, _module: nn.Module, args: tuple[Tensor, ...]
    ) -> tuple[Tensor] | None:
        now, states = self.now, args[0]
        if not now.plan[number]:
            return None
        assert now.keys is not None
        assert now.places is not None
        with torch.no_grad():
            keys = now.keys.unflatten(-1, (heads, -1)).mean(2).float()
            matching = self.pruner.match(keys, now.plan[number])
        sizes = torch.ones_like(keys[..., :1]) if now.sizes is None else now.sizes[..., None]
        sums = _summed(torch.cat([states.float() * sizes, sizes], 2), matching)
        now.sizes = sums[..., -1]
        now.places = now.places.gather(1, matching.kept)
        now.states = states
        now.merged = (sums[..., :-1] / sums[..., -1:]).to(states.dtype)
        return (now.merged,)

    def _hold(self, number: int, _module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
        if not self.now.plan[number]:
            return None
        assert self.now.states is not None
        self.now.added = output
        # the block adds this to its unmerged states; `_leave` replaces the sum
        return output.new_zeros(()).expand(self.now.states.shape)

    def _leave(self, number: int, module: nn.Module, _args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        if self.now.plan[number]:
            now = self.now
            unmerged, merged, added = now.states, now.merged, now.added
            now.states = now.merged = now.added = None
            if unmerged is None or merged is None or added is None:
                raise ContractError(f"{type(module).__name__} calls no norm before its MLP")
            if not self.checked and not torch.equal(states, unmerged):
                raise ContractError(
                    f"{type(module).__name__} has no form x + mlp(norm(x)) after its attention"
                )
            states = merged + added
        if number == len(self.blocks) - 1 and self.now.sizes is not None:
            self.now.output = states
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def _project(self, _module: nn.Module, _args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        # the model's own record of the states may be one from before `_leave`
        return None if self.now.output is None else (self.now.output[:, 1:],)

    def _spread(
        self, into: dict[str, Tensor], _module: nn.Module, _args: Any, output: Tensor
    ) -> Tensor:
        assert self.now.places is not None
        self.checked |= any(self.now.plan)
        places = self.now.places[:, 1:] - 1  # without CLS
        numbers = torch.arange(places.shape[1], device=places.device).expand_as(places)
        absent = torch.full((len(places), self.now.patches), -1.0, device=places.device)
        into["output_places"] = absent.scatter(1, places, numbers.float())
        spread = output.new_zeros(len(output), self.now.patches, output.shape[2])
        return spread.scatter(1, places[..., None].expand_as(output), output)


def _summed(x: Tensor, matching: Matching) -> Tensor:
    """[R, T, ...] -> [R, T', ...]: tokens plus those that merge into them.

    A product, because sums by index have no fixed order on a GPU.
    """
    remaining = gather_rows(x, matching.kept)
    sources = complement(matching.kept, x.shape[1])
    targets = matching.into.gather(1, sources)
    member = nn.functional.one_hot(targets, remaining.shape[1]).to(x.dtype)
    return remaining + member.transpose(1, 2) @ gather_rows(x, sources)
