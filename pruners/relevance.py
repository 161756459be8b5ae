"""How relevant a token is to the question: the scores that query-aware methods share."""

import torch
from torch import Tensor

from secateur.pruners.base import VisualTokens
from secateur.pruners.linalg import normalize


def clip_relevance(tokens: VisualTokens) -> Tensor:
    """[B, N] cosine of patch and text in CLIP's joint space, mean over segments; 0 without text.

    Patch embeddings of CLIP anti-correlate with the text, so that some methods negate this.
    """
    assert tokens.clip_patches is not None
    assert tokens.clip_text is not None
    cosine = normalize(tokens.clip_patches) @ normalize(tokens.clip_text).transpose(1, 2)
    return cosine.sum(2) / max(cosine.shape[2], 1)


def mean_text(tokens: VisualTokens) -> Tensor:
    """Mean of the question's token embeddings, [B, D]; 0 without text."""
    assert tokens.text_embeddings is not None
    real = text_mask(tokens)[..., None].float()
    return (tokens.text_embeddings * real).sum(1) / real.sum(1).clamp_min(1)


def text_mask(tokens: VisualTokens) -> Tensor:
    """[B, M] True for the real question tokens."""
    assert tokens.text_embeddings is not None
    shape, device = tokens.text_embeddings.shape[:2], tokens.text_embeddings.device
    return (
        torch.ones(shape, dtype=torch.bool, device=device)
        if tokens.text_mask is None
        else tokens.text_mask.bool()
    )


def embedding_relevance(tokens: VisualTokens) -> Tensor:
    """Cosine of token and mean question embedding in LLM space, [B, N]; 0 without text."""
    text = mean_text(tokens)
    dot = (tokens.features @ text[..., None])[..., 0]
    return dot / (
        tokens.features.norm(dim=2).clamp_min(1e-12)
        * text.norm(dim=1, keepdim=True).clamp_min(1e-12)
    )


def range_over_image(x: Tensor, image_of_row: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest of x [B, N] over all crops of each row's image, [B, 1] each."""
    low, high = x.amin(1), x.amax(1)
    if image_of_row is not None:
        image = torch.tensor(image_of_row, device=x.device)
        other = image[:, None] != image
        low = low.expand_as(other).masked_fill(other, torch.inf).amin(1)
        high = high.expand_as(other).masked_fill(other, -torch.inf).amax(1)
    return low[:, None], high[:, None]
