"""The contract of the pruners before the LLM: tensors in, indices out. It knows no model."""

import dataclasses
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, ConfigDict, InstanceOf, TypeAdapter, ValidationError
from torch import Tensor

# index of an output token that stands for no single patch: a kept CLS token, PruMerge's sum
EXTRA = -1
Status = Literal["official", "paper", "secondary", "reconstruction", "baseline"]
Space = Literal["encoder", "projected", "hidden"]


class PrunerError(ValueError):
    """A wrong option, budget or input of a pruner, or a wrong answer of its `select`."""


@dataclass(frozen=True)
class VisualTokens:
    """What a pruner may look at, for B images (or crops) of N tokens each.

    Only the captures that the pruner `needs` are filled. All rows share N and the grid. Without a
    CLS token (Qwen) `saliency` is the attention that a token receives.
    """

    features: Tensor  # [B, N, D] projected tokens, LLM width
    grid: tuple[int, int] | None = None  # (rows, columns), rows * columns = N, raster order
    encoder_features: Tensor | None = None  # [B, N, C] what the projector receives
    cls_token: Tensor | None = None  # [B, C] hidden state of CLS, same layer as encoder_features
    # [B, H, N] softmax attention CLS -> patch per head; CLS column dropped, not renormalised
    saliency: Tensor | None = None
    first_saliency: Tensor | None = None  # [B, H, N] the same in the encoder's first block
    # [B, N] attention received in a middle block, mean over heads and all queries
    object_attention: Tensor | None = None
    output_attention: Tensor | None = None  # [B, N] the same in the block of encoder_features
    # [B, 1+N, C] k_proj output in the block of encoder_features; CLS first if there is one
    encoder_keys: Tensor | None = None
    last_queries: Tensor | None = None  # [B, 1+N, C] q_proj output of the encoder's last block
    last_keys: Tensor | None = None  # [B, 1+N, C] k_proj output of the encoder's last block
    # [B, N] place of each patch in the output of an encoder that merges tokens; -1: merged away
    output_places: Tensor | None = None
    # [B, M, D] question tokens in LLM space, rows padded at the end
    text_embeddings: Tensor | None = None
    text_mask: Tensor | None = None  # [B, M] True for real question tokens; None: all are real
    clip_patches: Tensor | None = None  # [B, N, P] patches in CLIP's joint space
    clip_text: Tensor | None = None  # [B, S, P] question segments in CLIP's joint space
    # [B, N] relevance to the question, when the caller supplies it
    relevance: Tensor | None = None
    # the image that each row is a crop of; None: every row is its own image
    image_of_row: tuple[int, ...] | None = None
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
        """A copy whose floating captures are contiguous float32, the precision of all scoring."""
        tensors = {
            name: t.float().contiguous() if t.is_floating_point() else t
            for name, t in self.tensors().items()
        }
        return dataclasses.replace(self, **tensors)  # type: ignore[arg-type]


# a scalar on the device of the values, and what raises the error if it is False
Condition = tuple[Tensor, Callable[[], typing.NoReturn]]


@dataclass(frozen=True)
class Selection:
    """The tokens that the LLM receives, in that order.

    `features` replaces the kept tokens when a method merges or adds. `space` says what they are:
    `encoder` [B, K, C] enter the projector, `projected` [B, K, D] left it, `hidden` are states
    inside the LLM. An adaptive method gives `counts`; a row's places after its count are padding
    (index 0). `unplaced` of a row's tokens, the last ones, stand for no place of the image, such as
    means of clusters: among the crops of an image they are not sorted into the raster but come
    last, and padding does not remove them. Their index names the token they are centred on.
    `sizes` tells how many tokens each one stands for, for later layers that weigh it by that.
    """

    indices: Tensor  # [B, K] long, positions in 0..N-1 or EXTRA
    features: Tensor | None = None
    space: Space = "projected"
    counts: Tensor | None = None  # [B]
    custom_order: bool = False  # True: the method's own order; False: ascending
    diagnostics: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # name -> [B]
    unplaced: int = 0
    sizes: Tensor | None = None  # [B, K], at least 1

    @classmethod
    def ordered(cls, picks: Tensor, custom_order: bool, **rest: Any) -> "Selection":
        """`picks` [B, K] as they are with `custom_order`, else ascending."""
        indices = picks if custom_order else picks.sort(1).values
        return cls(indices, custom_order=custom_order, **rest)

    def check(self, pruner: str, batch: int, tokens: int) -> None:
        """Check the answer of `pruner` for `batch` images of `tokens` tokens.

        Raises:
            PrunerError: indices out of range, repeated, or not ascending without `custom_order`;
                a wrong shape, dtype, space or count; features that are not finite.
        """
        raise_first(self.conditions(pruner, batch, tokens))

    def conditions(self, pruner: str, batch: int, tokens: int) -> list[Condition]:
        """What has to hold of the values, left on their device; shapes are checked at once.

        Raises:
            PrunerError: a wrong shape, dtype or space.
        """

        def wrong(what: str) -> typing.NoReturn:
            raise PrunerError(
                f"pruner {pruner!r} returned {what}, for {batch} images of {tokens} tokens; "
                "its select() is wrong"
            )

        index = self.indices
        if index.dtype != torch.long or index.dim() != 2 or index.shape[0] != batch:
            wrong(
                f"indices of shape {tuple(index.shape)} and dtype {index.dtype}, "
                f"expected [{batch}, K] of torch.int64"
            )
        width = index.shape[1]
        if width == 0:
            wrong("no indices at all")
        if self.space not in typing.get_args(Space):
            wrong(
                f"space={self.space!r}, which is not one of "
                + ", ".join(map(repr, typing.get_args(Space)))
            )
        per_row = {f"diagnostic {name!r}": values for name, values in self.diagnostics.items()}
        for what, values in (
            per_row | ({} if self.counts is None else {"counts": self.counts})
        ).items():
            if values.shape != (batch,):
                wrong(f"{what} of shape {tuple(values.shape)}, expected [{batch}]")
        if not 0 <= self.unplaced <= width or (self.unplaced and self.features is None):
            wrong(f"unplaced={self.unplaced}, expected at most K, and features for these tokens")
        if self.features is not None and self.features.shape[:2] != index.shape:
            wrong(
                f"features of shape {tuple(self.features.shape)} "
                f"for indices of shape {tuple(index.shape)}"
            )
        if self.sizes is not None and self.sizes.shape != index.shape:
            wrong(f"sizes of shape {tuple(self.sizes.shape)}, expected those of indices")

        places, low = torch.arange(width, device=index.device), EXTRA
        real = torch.ones_like(index, dtype=torch.bool)
        found: list[Condition] = []
        if self.counts is not None:
            counts = self.counts
            real = places < counts[:, None]
            found.append(
                (
                    ((counts >= 1) & (counts <= width)).all(),
                    lambda: wrong(f"counts {counts.tolist()} outside 1..{width}"),
                )
            )
        if self.sizes is not None:
            found.append(((self.sizes >= 1).all(), lambda: wrong("sizes below 1")))
        if self.features is None:
            low = 0
        inside = (index >= low) & (index < tokens)
        found.append(
            (
                (inside | ~real).all(),
                lambda: wrong(
                    f"an index outside {low}..{tokens - 1}: "
                    f"{index[real].min().item()}..{index[real].max().item()}"
                ),
            )
        )
        # padding and EXTRA get values of their own, so that only patches can repeat
        distinct = torch.where(real & (index != EXTRA), index, tokens + places).sort(1).values
        found.append(
            (
                (distinct[:, 1:] != distinct[:, :-1]).all(),
                lambda: wrong("the same token more than once, as NaN scores do"),
            )
        )
        if not self.custom_order:
            after = (index[:, 1:] > index[:, :-1]) | ~real[:, 1:] | (index[:, :-1] == EXTRA)
            found.append(
                (
                    after.all(),
                    lambda: wrong("indices that do not ascend, without custom_order=True"),
                )
            )
        if self.features is not None:
            extremes = torch.stack([self.features.amin(2), self.features.amax(2)])
            found.append(
                (
                    (extremes.isfinite() | ~real).all(),
                    lambda: wrong("features with NaN or infinite values"),
                )
            )
        return found


def raise_first(conditions: "list[Condition]") -> None:
    """Raise the error of the first condition that does not hold; the device is asked once."""
    holds = torch.stack([holds for holds, _ in conditions])
    if not bool(holds.all()):
        conditions[holds.tolist().index(False)][1]()


@dataclass(frozen=True)
class Method:
    """A frozen dataclass: its fields are the hyper-parameters, its class attributes facts.

    A field gets the type of its annotation (1 becomes 1.0, a list a tuple). Values that do not fit
    raise PrunerError.
    """

    name: ClassVar[str]
    code: ClassVar[str]  # digest of its code, set by `register`
    paper: ClassVar[str]
    status: ClassVar[Status]
    merges: ClassVar[bool] = False
    adaptive: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[str]:
        """Names of the inputs that `select` reads; a class attribute if no option changes them."""
        raise NotImplementedError

    def __post_init__(self) -> None:
        """Convert every field to the type of its annotation, and check it."""
        cls: Any = type(self)  # mypy takes no dataclass type as a hashable
        for name, adapter in _adapters(cls).items():
            value = getattr(self, name)
            try:
                fit = adapter.validate_python(value)
            except ValidationError as error:
                reasons = dict.fromkeys(part["msg"] for part in error.errors())
                self.fail(f"{name}={value!r}: {'; '.join(reasons)}")
            object.__setattr__(self, name, fit)

    def fail(self, what: str) -> typing.NoReturn:
        """Raise PrunerError in the name of this pruner."""
        raise PrunerError(f"pruner {self.name!r}: {what}")


@cache
def _adapters(cls: Any) -> dict[str, TypeAdapter[Any]]:
    """The check of each field. Strict: a bool or a string is no number; NaN and inf are refused."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {f.name: _adapter(hints[f.name]) for f in dataclasses.fields(cls)}


def _adapter(hint: Any) -> TypeAdapter[Any]:
    if dataclasses.is_dataclass(hint):  # pydantic takes no config for these
        return TypeAdapter(InstanceOf[hint])
    if any(typing.get_origin(part) is tuple for part in (hint, *typing.get_args(hint))):
        # configs give lists, which a strict tuple refuses
        hint = Annotated[hint, BeforeValidator(lambda x: tuple(x) if isinstance(x, list) else x)]
    config = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    return TypeAdapter(hint, config=config)


@dataclass(frozen=True)
class ImageShape:
    """The sizes that decide a pruner's FLOPs for one image or crop."""

    tokens: int  # N
    kept: float  # K; a fraction when several crops share a budget
    width: int  # D, of the LLM
    encoder_width: int  # C, of the image encoder
    encoder_blocks: int = 0  # up to the one whose output the projector receives
    encoder_heads: int = 1

    @property
    def cls_attention(self) -> int:
        """FLOPs of the `saliency` capture: scores of the CLS query and all keys."""
        return 2 * (self.tokens + 1) * self.encoder_width

    @property
    def gram(self) -> int:
        """FLOPs of the Gram matrix of all projected tokens, without its symmetry."""
        return 2 * self.tokens**2 * self.width

    @property
    def encoder_gram(self) -> int:
        """FLOPs of the Gram matrix of all encoder tokens, without its symmetry."""
        return 2 * self.tokens**2 * self.encoder_width


@dataclass(frozen=True)
class Pruner(Method):
    """Base of every method before the LLM.

    Subclasses write `select` and `flops`; users call `prune`, which checks the input and the
    answer. Crops are pruned one by one, unless `packed`: then all crops of an image are one
    row, the sequence that the LLM would receive.
    """

    packed: ClassVar[bool] = False
    draws_per_document: ClassVar[bool] = False  # random choices depend on `sample_ids`

    @property
    def question_agnostic(self) -> bool:
        """Whether all questions about an image keep the same tokens of it."""
        reads = {"text_embeddings", "text_mask", "clip_text", "relevance"} & self.needs
        return not reads and not self.draws_per_document

    @property
    def needs(self) -> frozenset[str]:
        """Names of the captures that `select` reads."""
        return frozenset({"features"})

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """Choose `keep` of N tokens (1 <= keep < N) per row; inputs are float32 and finite."""
        raise NotImplementedError

    def flops(self, shape: ImageShape) -> float | None:
        """FLOPs of the dominating matrix products, for one image or crop; None: not counted.

        A multiply-add is 2 FLOPs. Captures that the model does not compute anyway count as well.
        """
        return None

    def prune(self, tokens: VisualTokens, keep: int) -> Selection:
        """`select` between checks; all tokens untouched when keep = N.

        Raises:
            PrunerError: keep outside 1..N; a capture that is missing, misshapen or not finite; a
                wrong answer of `select`.
        """
        finite = self._check_input(tokens, keep)
        batch, count = tokens.shape
        if keep == count:
            raise_first([finite])
            return Selection(torch.arange(count, device=tokens.features.device).expand(batch, -1))
        try:
            with torch.no_grad():
                selection = self.select(tokens.in_float32(), keep)
        except Exception:
            raise_first([finite])  # the cause, if it is the input
            raise
        # together, since asking makes a GPU wait
        raise_first([finite, *answer_conditions(self, selection, batch, count)])
        return selection

    def _check_input(self, tokens: VisualTokens, keep: int) -> Condition:
        """Check the input but for its values, which the condition is about."""
        if not isinstance(tokens.features, Tensor):
            self.fail(
                f"features are a {type(tokens.features).__name__}, expected a tensor [B, N, D]"
            )
        if tokens.features.dim() != 3 or 0 in tokens.features.shape:
            self.fail(
                f"features have shape {tuple(tokens.features.shape)}, "
                "expected [B, N, D] with none of them 0"
            )
        batch, count = tokens.shape
        check_keep(self, keep, count)
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
            check_shape(self, name, tensor, _AXES[name], sizes)
        checked = {name: t for name, t in tokens.tensors().items() if name in self.needs}
        if integers := [
            f"{name} {t.dtype}" for name, t in checked.items() if not t.is_floating_point()
        ]:
            self.fail(f"expects floating point, and got {', '.join(integers)}")

        def not_finite() -> typing.NoReturn:
            bad = [
                f"{name} {list(t.shape)}" for name, t in checked.items() if not bool(is_finite(t))
            ]
            self.fail(f"NaN or infinite values in {', '.join(bad)}")

        return torch.stack([is_finite(t) for t in checked.values()]).all(), not_finite


# capture -> its axes; a letter stands for the same size wherever it appears
_AXES = {
    "features": ("B", "N", "D"),
    "encoder_features": ("B", "N", "C"),
    "cls_token": ("B", "C"),
    "saliency": ("B", "H", "N"),
    "first_saliency": ("B", "H", "N"),
    "object_attention": ("B", "N"),
    "output_attention": ("B", "N"),
    "encoder_keys": ("B", "N or 1+N", "E"),
    "last_queries": ("B", "1+N", "F"),
    "last_keys": ("B", "1+N", "F"),
    "output_places": ("B", "N"),
    "text_embeddings": ("B", "M", "D"),
    "text_mask": ("B", "M"),
    "clip_patches": ("B", "N", "P"),
    "clip_text": ("B", "S", "P"),
    "relevance": ("B", "N"),
}
_MAY_BE_EMPTY = ("M", "S")  # a question can have no tokens, or no segments


def check_keep(method: Method, keep: int, tokens: int) -> None:
    """Raise PrunerError unless `keep` is an integer in 1..tokens."""
    if not isinstance(keep, int) or isinstance(keep, bool) or not 1 <= keep <= tokens:
        method.fail(
            f"cannot keep {keep!r} of {tokens} tokens; "
            f"the budget must be an integer between 1 and {tokens}"
        )


def check_answer(method: Method, answer: Any, batch: int, tokens: int) -> None:
    """Raise PrunerError unless `answer` is a sound Selection."""
    raise_first(answer_conditions(method, answer, batch, tokens))


def answer_conditions(method: Method, answer: Any, batch: int, tokens: int) -> "list[Condition]":
    """The conditions of an answer; raises PrunerError if it is no Selection."""
    if not isinstance(answer, Selection):
        method.fail(f"select() returned a {type(answer).__name__}, expected a Selection")
    return answer.conditions(method.name, batch, tokens)


def is_finite(x: Tensor) -> Tensor:
    """Whether all values are finite.

    Only the two extremes are tested, which is much cheaper: a NaN makes both of them NaN.
    """
    if not x.numel():
        return torch.ones((), dtype=torch.bool, device=x.device)
    return torch.isfinite(torch.stack(x.aminmax())).all()


def check_shape(
    method: Method, name: str, tensor: Tensor, axes: tuple[str, ...], sizes: dict[str, int]
) -> None:
    """Raise PrunerError unless `tensor` has `axes`; `sizes` collects the size of each axis."""
    fits = tensor.dim() == len(axes) and all(
        size == sizes.setdefault(axis, size) and (size or axis in _MAY_BE_EMPTY)
        for axis, size in zip(axes, tensor.shape, strict=True)
    )
    if not fits:
        expected = ", ".join(
            f"{axis} = {sizes[axis]}" if sizes.get(axis) else axis for axis in axes
        )
        method.fail(f"{name} has shape {tuple(tensor.shape)}, expected [{expected}]")
