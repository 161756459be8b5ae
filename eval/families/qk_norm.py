"""Language models that norm the queries and keys of every head, as Qwen3 does."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

PARTS = ("layers.0.self_attn.q_norm", "layers.0.self_attn.k_norm")  # of the language model


class NormedProjection(nn.Module):
    """A projection and the norm of its heads after it, as one module: [B, L, D] -> [B, L, H d].

    A forward hook sees what the norm returns when the model itself calls both.
    """

    def __init__(self, projection: nn.Module, norm: nn.Module, size: int) -> None:
        super().__init__()
        self.size = size  # of a head
        self.parts = (projection, norm)  # a tuple, so that they belong to the model alone

    def forward(self, hidden: Tensor) -> Tensor:
        projection, norm = self.parts
        return norm(projection(hidden).unflatten(-1, (-1, self.size))).flatten(-2)

    def register_forward_hook(self, hook: Callable[..., Any], **options: Any) -> RemovableHandle:
        def flat(module: nn.Module, args: Any, output: Tensor) -> Any:
            return hook(module, args, output.flatten(-2))

        return self.parts[1].register_forward_hook(flat, **options)


def normed_projections(attention: Any) -> tuple[nn.Module, nn.Module]:
    """The modules that make queries and keys of an attention, with their norms."""
    size = attention.head_dim
    return (
        NormedProjection(attention.q_proj, attention.q_norm, size),
        NormedProjection(attention.k_proj, attention.k_norm, size),
    )
