"""A mismatch in float64: does it come from candidates that rounding cannot tell apart?"""

from typing import Any, NamedTuple

import torch
from reference.golden_adapters import Adapter, Case, Tensors
from torch import Tensor
from torch.overrides import TorchFunctionMode

MARGIN = 1e-6  # candidates with scores closer than this are tied
TRIED = 500  # ties that are broken the other way, the closest first
_SORTS = {torch.Tensor.sort, torch.sort, torch.Tensor.topk, torch.topk}
_CHOICES = {
    getattr(place, name) for place in (torch.Tensor, torch) for name in ("argmax", "argmin")
} | {torch.Tensor.max, torch.Tensor.min}


class Tie(NamedTuple):
    """Two candidates and their scores, the first in the order of the pick first."""

    candidates: tuple[int, int]
    scores: tuple[float, float]

    @property
    def margin(self) -> float:
        return abs(self.scores[0] - self.scores[1])


class _Float64(TorchFunctionMode):
    """Computes in float64, collects ties, and breaks one of them the other way.

    A case may compute a selection more than once, so a tie is broken wherever it is met.
    """

    def __init__(self, exchange: Tie | None = None) -> None:
        super().__init__()
        self.exchange, self.ties = exchange, set[Tie]()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.randn:  # the numbers of float32, which are others than those of float64
            return func(*args, **{"dtype": torch.float32} | kwargs).double()
        result = (torch.Tensor.double if func is torch.Tensor.float else func)(*args, **kwargs)
        if not (func in _SORTS or func in _CHOICES) or not args[0].is_floating_point():
            return result
        place = 2 if func in (torch.Tensor.topk, torch.topk) else 1
        dim = kwargs.get("dim", args[place] if len(args) > place else None)
        if dim is None and func in _SORTS:
            dim = -1
        if not isinstance(dim, int) or args[0].shape[dim] < 2:  # of all entries, or of two tensors
            return result
        if func in _SORTS:
            values, indices = (part.movedim(dim, -1).clone() for part in result)
            self._break(values, indices)
            return type(result)([values.movedim(-1, dim), indices.movedim(-1, dim)])
        largest = func.__name__ in ("argmax", "max")
        values, indices = args[0].movedim(dim, -1).sort(dim=-1, descending=largest, stable=True)
        self._break(values[..., :2], indices[..., :2])
        if kwargs.get("keepdim"):
            return result
        values, indices = values[..., 0], indices[..., 0]
        return indices if isinstance(result, Tensor) else type(result)([values, indices])

    def _break(self, values: Tensor, indices: Tensor) -> None:
        """Note the ties of neighbours in sorted values; exchange the chosen one in place."""
        tied = (values[..., 1:] - values[..., :-1]).abs() < MARGIN  # NaN, as inf - inf, is none
        for *row, at in tied.nonzero().tolist():
            pair = (*row, slice(at, at + 2))
            found = Tie(tuple(indices[pair].tolist()), tuple(values[pair].tolist()))
            self.ties.add(found)
            if found == self.exchange:
                for part in (values, indices):
                    part[pair] = part[pair].flip(0)


def tie(adapter: Adapter, case: Case, tensors: Tensors) -> float | None:
    """The margin of the tie that explains a mismatch; None if no tie does.

    The case runs again in float64. It is a tie if the recorded outputs follow there, with or
    without one tie broken the other way.
    """
    exact, ties = _run(adapter, case, tensors)
    closest = sorted(ties, key=lambda one: one.margin)
    if exact and closest:
        return closest[0].margin
    for one in closest[:TRIED]:
        if _run(adapter, case, tensors, one)[0]:
            return one.margin
    return None


def _run(
    adapter: Adapter, case: Case, tensors: Tensors, exchange: Tie | None = None
) -> tuple[bool, set[Tie]]:
    """Whether a case is exact in float64, and its ties."""
    own = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64(exchange) as mode:
            results = adapter(case, own)
    except RuntimeError:  # the exchanged candidate is none, as a token that is taken
        return False, set()
    finally:
        torch.set_default_dtype(default)
    return all(one.exact for one in results), mode.ties
