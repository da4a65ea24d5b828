"""Attention of images of equal or padded length, and the class token's row of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Attention of images in the padded layout.

    Args:
        q: ``(B, N, heads, dim)`` queries; ``k``, ``v`` likewise.
        k: keys.
        v: values.
        mask: ``(B, 1, 1, N)`` bool, which keys are read, or float, added to their scores.
        dropout: probability of dropping an attention weight.

    Returns:
        ``(B, N, heads, dim)``.
    """
    added = mask is not None and mask.dtype != torch.bool
    if mask is not None and added:
        mask = mask.to(q.dtype)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if not dropout and exporting():
        # torch 2.14 can't export the fused call where the number of tokens depends on the image,
        # and its ONNX form of it has three times as many operations.
        score = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
        if mask is not None:
            score = score + mask if added else score.masked_fill(~mask, -torch.inf)
        return (score.softmax(-1) @ v).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout).transpose(1, 2)


def exporting() -> bool:
    """Whether ``torch.export`` traces the model, so that operations count, not their memory."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def gated(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Attention that removes tokens by a differentiable factor.

    DynamicViT, Rao et al., NeurIPS 2021, equations 10 and 11: the weights are exp(score) G divided
    by their sum, where G_ij = keep_j for i != j and G_ii = 1.

    Args:
        q: ``(B, N, heads, dim)`` queries; ``k``, ``v`` likewise.
        k: keys.
        v: values.
        keep: ``(B, N)`` 1 for a kept token, 0 for a removed one.

    Returns:
        ``(B, N, heads, dim)``.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    score = (q @ k.transpose(2, 3)).float() * q.shape[-1] ** -0.5
    itself = torch.eye(keep.shape[1], dtype=torch.bool, device=keep.device)
    gate = keep[:, None, None, :].masked_fill(itself, 1.0)
    weight = (score - score.amax(-1, keepdim=True).detach()).exp() * gate
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-12)
    return (weight.to(v.dtype) @ v).transpose(1, 2)


def first_scores(q: Tensor, k: Tensor) -> Tensor:
    """Dot products of each image's first query with its keys.

    Args:
        q: ``(B, N, heads, dim)`` queries.
        k: keys, likewise.

    Returns:
        ``(B, N, heads)`` float32.
    """
    # vecdot reads the keys in place; a matrix product would copy them first.
    return torch.linalg.vecdot(k.float(), q[:, 0, None].float())


def class_row(score: Tensor, width: int, mask: Tensor | None) -> Tensor:
    """Attention of the class token to all tokens, mean over the heads.

    The mask is applied in the softmax of every head; masking after the mean gives other values.

    Args:
        score: ``(B, N, heads)`` from :func:`first_scores`; the first token is the class token.
        width: width of a head.
        mask: as for :func:`padded`.

    Returns:
        ``(B, N)`` float32.
    """
    mask = None if mask is None else mask[:, 0, 0, :, None]
    return _weights(score, width, mask, dim=1).mean(2)


def matrix(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """The whole attention matrix of a block, for reducers that work on the attention graph.

    Args:
        q: ``(B, N, heads, dim)`` queries; ``k`` likewise.
        k: keys.
        mask: as for :func:`padded`.

    Returns:
        ``(B, heads, N, N)`` float32, query by key; 0 for removed keys, undefined for removed
        queries.
    """
    return _weights(torch.einsum("bnhd,bmhd->bhnm", q, k), q.shape[-1], mask)


def _weights(score: Tensor, width: int, mask: Tensor | None, dim: int = -1) -> Tensor:
    """Softmax attention, float32, from dot products whose dimension ``dim`` is that of the keys.

    ``mask``: as for :func:`padded`, but of a shape that fits ``score``.
    """
    score = score.float() * width**-0.5
    if mask is not None and mask.dtype == torch.bool:
        score = score.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        score = score + mask
    return score.softmax(dim)
