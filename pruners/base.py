"""The contract between pruning maths and everything else: tensors in, indices out. Knows no model."""

import dataclasses
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from secateur.pruners.fields import Range, describe, fits

EXTRA = (
    -1
)  # index of an output token that stands for no single patch (a kept CLS token, PruMerge's sum)
Status = Literal["official", "paper", "secondary", "reconstruction", "baseline"]
Space = Literal["encoder", "projected", "hidden"]


class PrunerError(ValueError):
    """A pruner was asked for the impossible, fed wrong tensors, or answered wrongly."""


@dataclass(frozen=True)
class VisualTokens:
    """What a pruner may look at, for B images (or crops) of N tokens each; only the captures it `needs` are filled.

    All rows share N and the grid. Without a CLS token (Qwen) `saliency` is the attention a token receives.
    """

    features: Tensor  # [B, N, D] projected tokens, LLM width
    grid: tuple[int, int] | None = None  # (rows, columns), rows * columns = N, raster order
    encoder_features: Tensor | None = None  # [B, N, C] what the projector receives
    cls_token: Tensor | None = None  # [B, C] hidden state of the CLS row beside encoder_features
    saliency: Tensor | None = (
        None  # [B, H, N] per head: softmax attention CLS -> patch, CLS column dropped, not renormalised
    )
    object_attention: Tensor | None = (
        None  # [B, N] attention received in a middle block, mean over heads and all queries
    )
    output_attention: Tensor | None = None  # [B, N] the same in the block of encoder_features
    encoder_keys: Tensor | None = (
        None  # [B, 1+N, C] k_proj output in the block of encoder_features, first CLS if there is one
    )
    last_queries: Tensor | None = None  # [B, 1+N, C] q_proj output of the encoder's last block
    last_keys: Tensor | None = None  # [B, 1+N, C] k_proj output of the encoder's last block
    text_embeddings: Tensor | None = (
        None  # [B, M, D] question tokens in LLM space, rows padded at the end
    )
    text_mask: Tensor | None = None  # [B, M] True for real question tokens; None: all real
    clip_patches: Tensor | None = None  # [B, N, P] patches in CLIP's joint space
    clip_text: Tensor | None = None  # [B, S, P] question segments in CLIP's joint space
    relevance: Tensor | None = (
        None  # [B, N] relevance to the question, where the caller scores it himself
    )
    image_of_row: tuple[int, ...] | None = (
        None  # which image each row is a crop of; None: every row its own image
    )
    sample_ids: tuple[str, ...] | None = None  # "document|crop" per row, seeds random choices

    @property
    def shape(self) -> tuple[int, int]:
        """(B, N)."""
        return self.features.shape[0], self.features.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """The filled captures by name."""
        return {
            f.name: value
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }

    def in_float32(self) -> "VisualTokens":
        """The same with every floating capture in contiguous float32, the precision all scoring runs in."""
        tensors = {
            name: t.float().contiguous() if t.is_floating_point() else t
            for name, t in self.tensors().items()
        }
        return dataclasses.replace(self, **tensors)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Selection:
    """Which tokens go on, in the order the LLM receives them.

    `features` replaces the tokens where a method merges or adds; `space` tells whether it is [B, K, C] for the projector,
    [B, K, D] behind it, or hidden states inside the LLM. Adaptive methods give `counts`; places of a row behind its count are
    padding (index 0).
    """

    indices: Tensor  # [B, K] long, positions in 0..N-1 or EXTRA
    features: Tensor | None = None
    space: Space = "projected"
    counts: Tensor | None = None  # [B]
    custom_order: bool = False  # True: the method's own order; False: ascending
    diagnostics: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # name -> [B]

    def check(self, who: str, batch: int, tokens: int) -> None:
        """Raise PrunerError unless indices are in range, distinct and ascending (unless `custom_order`), and all else as declared."""

        def wrong(what: str) -> typing.NoReturn:
            raise PrunerError(
                f"pruner {who!r} returned {what}, for {batch} images of {tokens} tokens; its select() is wrong"
            )

        index = self.indices
        if index.dtype != torch.long or index.dim() != 2 or index.shape[0] != batch:
            wrong(
                f"indices of shape {tuple(index.shape)} and dtype {index.dtype}, expected [{batch}, K] of torch.int64"
            )
        if index.shape[1] == 0:
            wrong("no indices at all")
        if not fits(Space, self.space):
            wrong(f"space={self.space!r}, which is not {describe(Space)}")
        per_row = {f"diagnostic {name!r}": values for name, values in self.diagnostics.items()}
        for what, values in (
            per_row | ({} if self.counts is None else {"counts": self.counts})
        ).items():
            if values.shape != (batch,):
                wrong(f"{what} of shape {tuple(values.shape)}, expected [{batch}]")
        if self.counts is not None and bool(
            ((self.counts < 1) | (self.counts > index.shape[1])).any()
        ):
            wrong(f"counts {self.counts.tolist()} outside 1..{index.shape[1]}")
        counts = (
            self.counts
            if self.counts is not None
            else torch.full((batch,), index.shape[1], device=index.device)
        )
        real = torch.arange(index.shape[1], device=index.device) < counts[:, None]
        low = EXTRA if self.features is not None else 0
        if bool(((index < low) | (index >= tokens))[real].any()):
            wrong(
                f"an index outside {low}..{tokens - 1}: {index[real].min().item()}..{index[real].max().item()}"
            )
        # padding and EXTRA get values of their own, so that only patches can repeat
        places = torch.arange(index.shape[1], device=index.device)
        distinct = torch.where(real & (index != EXTRA), index, tokens + places).sort(1).values
        if bool((distinct[:, 1:] == distinct[:, :-1]).any()):
            wrong("the same token more than once, as NaN scores do")
        if not self.custom_order and bool(
            ((index[:, 1:] <= index[:, :-1]) & real[:, 1:] & (index[:, :-1] != EXTRA)).any()
        ):
            wrong("indices that do not ascend, without custom_order=True")
        if self.features is not None:
            if self.features.shape[:2] != index.shape:
                wrong(
                    f"features of shape {tuple(self.features.shape)} for indices of shape {tuple(index.shape)}"
                )
            if not bool(
                torch.isfinite(torch.stack([self.features.amin(2), self.features.amax(2)]))[
                    :, real
                ].all()
            ):
                wrong("features with NaN or infinite values")


@dataclass(frozen=True)
class Method:
    """What every method is: a frozen dataclass whose fields are the hyper-parameters, and facts about it."""

    name: ClassVar[str]
    paper: ClassVar[str]
    status: ClassVar[Status]
    merges: ClassVar[bool] = False
    adaptive: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        """Names of the inputs that `select` reads; a plain class attribute where they depend on no option."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        """Check every field against its annotation: type, choices of a Literal, Range of a number."""
        hints = typing.get_type_hints(type(self), include_extras=True)
        for name in (f.name for f in dataclasses.fields(self)):
            if not fits(hints[name], getattr(self, name)):
                self.fail(f"{name}={getattr(self, name)!r} is not {describe(hints[name])}")

    def fail(self, what: str) -> typing.NoReturn:
        """Raise PrunerError in the name of this pruner."""
        raise PrunerError(f"pruner {self.name!r}: {what}")


@dataclass(frozen=True)
class Pruner(Method):
    """Base of every method that acts before the LLM. Subclasses write `select`; users call `prune`, which checks both ends.

    Images of several crops are pruned crop by crop, unless `packed`: then as one row, the sequence the LLM would receive.
    """

    packed: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        """Names of the captures that `select` reads; a plain class attribute where they depend on no option."""
        return frozenset({"features"})

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """Choose `keep` of N tokens (1 <= keep < N) per row; inputs are float32 and finite."""
        raise NotImplementedError

    def prune(self, tokens: VisualTokens, keep: int) -> Selection:
        """`select` between checks; all tokens untouched when keep = N.

        Raises:
            PrunerError: keep outside 1..N, a missing or misshapen or non-finite capture, or a wrong answer of `select`.
        """
        self._check_input(tokens, keep)
        batch, count = tokens.shape
        if keep == count:
            return Selection(torch.arange(count, device=tokens.features.device).expand(batch, -1))
        with torch.no_grad():
            selection = self.select(tokens.in_float32(), keep)
        selection.check(self.name, batch, count)
        return selection

    def _check_input(self, tokens: VisualTokens, keep: int) -> None:
        if not isinstance(tokens.features, Tensor):
            self.fail(
                f"features are a {type(tokens.features).__name__}, expected a tensor [B, N, D]"
            )
        if tokens.features.dim() != 3 or 0 in tokens.features.shape:
            self.fail(
                f"features have shape {tuple(tokens.features.shape)}, expected [B, N, D] with none of them 0"
            )
        batch, count = tokens.shape
        if not fits(Annotated[int, Range(1, count)], keep):
            self.fail(
                f"cannot keep {keep!r} of {count} tokens; the budget must be an integer between 1 and {count}"
            )
        for name in sorted(self.needs):
            if getattr(tokens, name) is None:
                self.fail(f"needs {name!r}, which this model or call does not provide")
        if tokens.grid is not None and (
            min(tokens.grid) < 1 or tokens.grid[0] * tokens.grid[1] != count
        ):
            self.fail(f"grid {tokens.grid} does not hold {count} tokens")
        for name in ("image_of_row", "sample_ids"):
            if (rows := getattr(tokens, name)) is not None and len(rows) != batch:
                self.fail(
                    f"{name} has {len(rows)} entries, expected one for each of B = {batch} rows"
                )
        sizes = {"B": batch, "N": count, "1+N": count + 1, "D": tokens.features.shape[2]}
        for name, tensor in tokens.tensors().items():
            _check_shape(self, name, tensor, sizes)
        checked = {name: t for name, t in tokens.tensors().items() if name in self.needs}
        if integers := [
            f"{name} {t.dtype}" for name, t in checked.items() if not t.is_floating_point()
        ]:
            self.fail(f"expects floating point, and got {', '.join(integers)}")
        if not bool(torch.stack([_finite(t) for t in checked.values()]).all()):
            bad = [f"{name} {list(t.shape)}" for name, t in checked.items() if not bool(_finite(t))]
            self.fail(f"NaN or infinite values in {', '.join(bad)}")


@dataclass(frozen=True)
class LayerTokens:
    """What an in-LLM pruner may look at between two layers, for B prompts of L positions with n visual tokens each."""

    visual: Tensor  # [B, n] long, positions of the visual tokens, ascending
    text: Tensor  # [B, L] True at the real positions behind the image
    hidden: Tensor | None = (
        None  # [B, L, D] states that enter the next layer (through the final norm if `apply_final_norm`)
    )
    attention: Tensor | None = (
        None  # [B, H, Q, L] softmax rows of the positions in `queries`, rows padded at the end
    )
    query_mask: Tensor | None = None  # [B, Q] True at real rows of `attention`; None: all real
    keys: Tensor | None = None  # [B, H, L, d] keys of the layer before, after the rotary embedding

    @property
    def shape(self) -> tuple[int, int]:
        """(B, n)."""
        return self.visual.shape[0], self.visual.shape[1]

    def visual_rows(self, x: Tensor) -> Tensor:
        """[B, L, ...] -> [B, n, ...]: the rows of the visual tokens."""
        return x[torch.arange(len(x), device=x.device)[:, None], self.visual]

    def relevance(self) -> Tensor:
        """[B, n] attention the visual tokens get, mean over heads and over the real rows."""
        assert self.attention is not None
        rows = self.attention.mean(1)
        mask = torch.ones_like(rows[..., 0])
        mask = mask if self.query_mask is None else self.query_mask.to(rows.dtype)
        received = (rows * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return received.gather(1, self.visual)

    def survivors(self, kept: Tensor) -> Tensor:
        """Visual tokens that stay, [B, k] in 0..n-1 -> every position that stays, [B, L-n+k], ascending."""
        stays = (
            torch.ones_like(self.text)
            .scatter(1, self.visual, False)
            .scatter(1, self.visual.gather(1, kept), True)
        )
        length = stays.shape[1] - self.visual.shape[1] + kept.shape[1]
        return stays.sort(dim=1, descending=True, stable=True).indices[:, :length]


@dataclass(frozen=True)
class InLLMPruner(Method):
    """Base of every method that drops visual tokens between LLM layers.

    The harness asks `schedule` once, `queries` once before layer 0, and `prune` at every layer of the schedule, before it runs.
    Subclasses write `schedule` and `select`, whose indices count visual tokens (0..n-1); EXTRA rows with features follow them.
    """

    attention_of: ClassVar[Literal["previous", "next"]] = (
        "previous"  # layer whose rows `attention` holds
    )
    apply_final_norm: ClassVar[bool] = False  # hidden states go through the LLM's final norm first

    @property
    def positions(self) -> Literal["original", "reindex"]:
        """Whether survivors keep their position ids; a field where a method leaves the choice."""
        return "original"

    def schedule(self, tokens: int, layers: int, keep: int) -> dict[int, int]:
        """0-based layer -> `keep` of the `prune` before it, for `tokens` visual tokens and a nominal budget `keep`."""
        raise NotImplementedError

    def queries(self, embeddings: Tensor, visual: Tensor, text: Tensor) -> Tensor:
        """[B, L] mask of the positions whose attention is wanted; here the last prompt position.

        Args:
            embeddings: [B, L, D] what enters layer 0.
            visual: [B, n] as in LayerTokens.
            text: [B, L] as in LayerTokens.
        """
        return text & (text.cumsum(1) == text.sum(1, keepdim=True))

    def tokens_after(self, tokens: int, keep: int) -> int:
        """How many of `tokens` visual tokens go on after `prune` with `keep`; here `keep`."""
        return keep

    def layer_tokens(self, tokens: int, layers: int, keep: int) -> list[int]:
        """Visual tokens that each layer processes, by the schedule for `tokens` of them and a nominal budget `keep`."""
        plan, counts = self.schedule(tokens, layers, keep), []
        for layer in range(layers):
            tokens = self.tokens_after(tokens, plan[layer]) if layer in plan else tokens
            counts.append(tokens)
        return counts

    def average(self, tokens: int, layers: int, keep: int) -> float:
        """Mean of `layer_tokens`: what the budgets of in-LLM methods are compared by."""
        return sum(self.layer_tokens(tokens, layers, keep)) / layers

    def select(self, tokens: LayerTokens, keep: int) -> Selection:
        """Choose `keep` of n visual tokens (1 <= keep < n) per row; inputs are float32 and finite."""
        raise NotImplementedError

    def prune(self, tokens: LayerTokens, keep: int) -> Selection:
        """`select` between checks; all tokens untouched when keep = n.

        Raises:
            PrunerError: keep outside 1..n, a missing or misshapen or non-finite input, or a wrong answer of `select`.
        """
        self._check_input(tokens, keep)
        batch, count = tokens.shape
        if keep == count:
            return Selection(torch.arange(count, device=tokens.visual.device).expand(batch, -1))
        floats = {name: getattr(tokens, name).float().contiguous() for name in self.needs}
        with torch.no_grad():
            selection = self.select(dataclasses.replace(tokens, **floats), keep)
        selection.check(self.name, batch, count)
        return selection

    def _check_input(self, tokens: LayerTokens, keep: int) -> None:
        sizes: dict[str, int] = {}
        for name in ("visual", "text", *sorted(self.needs), "query_mask"):
            tensor = getattr(tokens, name)
            if tensor is None and name in self.needs:
                self.fail(f"needs {name!r}, which this call does not provide")
            if tensor is not None:
                _check_shape(self, name, tensor, sizes)
                if tensor.is_floating_point() and not bool(_finite(tensor)):
                    self.fail(f"NaN or infinite values in {name} {list(tensor.shape)}")
        if not fits(Annotated[int, Range(1, sizes["n"])], keep):
            self.fail(
                f"cannot keep {keep!r} of {sizes['n']} tokens; the budget must be an integer between 1 and {sizes['n']}"
            )
        if not bool(tokens.text.any(1).all()):
            self.fail(
                "text has a row without a real position; the prompt needs text behind the image"
            )


# input -> its axes; a letter stands for the same size wherever it appears
_AXES = {
    "features": ("B", "N", "D"),
    "encoder_features": ("B", "N", "C"),
    "cls_token": ("B", "C"),
    "saliency": ("B", "H", "N"),
    "object_attention": ("B", "N"),
    "output_attention": ("B", "N"),
    "encoder_keys": ("B", "N or 1+N", "E"),
    "last_queries": ("B", "1+N", "F"),
    "last_keys": ("B", "1+N", "F"),
    "text_embeddings": ("B", "M", "D"),
    "text_mask": ("B", "M"),
    "clip_patches": ("B", "N", "P"),
    "clip_text": ("B", "S", "P"),
    "relevance": ("B", "N"),
    "visual": ("B", "n"),
    "text": ("B", "L"),
    "hidden": ("B", "L", "D"),
    "attention": ("B", "H", "Q", "L"),
    "query_mask": ("B", "Q"),
    "keys": ("B", "G", "L", "d"),
}
_MAY_BE_EMPTY = ("M", "S")  # a question can have no tokens, or no segments


def _finite(x: Tensor) -> Tensor:
    """Whether all values are finite; the extremes tell, NaN included, at a fraction of the cost of asking every value."""
    return (
        torch.isfinite(torch.stack(x.aminmax())).all()
        if x.numel()
        else torch.ones((), dtype=torch.bool, device=x.device)
    )


def _check_shape(method: Method, name: str, tensor: Tensor, sizes: dict[str, int]) -> None:
    """Compare with _AXES; sizes seen for the first time are noted in `sizes`."""
    axes = _AXES[name]
    fits = tensor.dim() == len(axes) and all(
        size == sizes.setdefault(axis, size) and (size or axis in _MAY_BE_EMPTY)
        for axis, size in zip(axes, tensor.shape, strict=True)
    )
    if not fits:
        expected = ", ".join(
            f"{axis} = {sizes[axis]}" if sizes.get(axis) else axis for axis in axes
        )
        method.fail(f"{name} has shape {tuple(tensor.shape)}, expected [{expected}]")


REGISTRY: dict[str, type[Pruner] | type[InLLMPruner]] = {}
P = TypeVar("P", Pruner, InLLMPruner)


def register(name: str) -> Callable[[type[P]], type[P]]:
    """Class decorator: make a pruner known by `name` to configs, command lines and tests."""

    def add(cls: type[P]) -> type[P]:
        if name in REGISTRY:
            raise PrunerError(
                f"two pruners are called {name!r}: {REGISTRY[name].__qualname__} and {cls.__qualname__}"
            )
        cls.name = name
        REGISTRY[name] = cls
        return cls

    return add


def build(name: str, **options: Any) -> Any:
    """The Pruner or InLLMPruner called `name` with its fields set; unknown names and options are errors that list the known."""
    if name not in REGISTRY:
        raise PrunerError(f"unknown pruner {name!r}; known: {', '.join(sorted(REGISTRY))}")
    known = [f.name for f in dataclasses.fields(REGISTRY[name])]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise PrunerError(
            f"pruner {name!r} has no option {', '.join(unknown)}; its options: {', '.join(known) or 'none'}"
        )
    return REGISTRY[name](**options)
