"""Attention of a batch of images, padded or packed, and the one row of it that decisions read."""

from __future__ import annotations

import itertools
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenenv.tokens import Packing


def padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Attention of equally long or masked images.

    Args:
        q: ``(B, N, heads, dim)`` queries; ``k``, ``v`` likewise.
        k: keys.
        v: values.
        mask: ``(B, 1, 1, N)`` bool, which keys are read, or float, what is added to their scores.
        dropout: probability of dropping an attention weight.

    Returns:
        ``(B, N, heads, dim)``.
    """
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, dropout).transpose(1, 2)


def gated(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """Attention in which tokens leave by a factor that has a gradient.

    DynamicViT, Rao et al., NeurIPS 2021, equations 10 and 11: weights exp(score) G over their sum,
    with G_ij = keep_j, but 1 where i = j.

    Args:
        q: ``(B, N, heads, dim)`` queries; ``k``, ``v`` likewise.
        k: keys.
        v: values.
        keep: ``(B, N)`` 1 for a token that is there, 0 for one that left.

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


def packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    bias: Tensor | None,
    scores: list[Tensor] | None = None,
) -> Tensor:
    """Attention of images that lie end to end, each among its own tokens.

    On a CPU image by image, a few at a time where all are equally long; on a GPU then all at once,
    else by one kernel of variable length, where the tensors are of half precision, no key has a
    bias and torch has that kernel (2.10).

    Args:
        q: ``(T, heads, dim)`` queries; ``k``, ``v`` likewise.
        k: keys.
        v: values.
        packing: where each image begins and ends.
        bias: ``(B, 1, 1, N)`` what is added to the scores of each image's keys.
        scores: where not all run at once, this list gets the ``(n, heads)`` products of each
            image's first query and its keys, made while a cache still holds them.

    Returns:
        ``(T, heads, dim)``.
    """
    longest = max(packing.lengths)
    even = min(packing.lengths) == longest
    if even and q.device.type != "cpu":
        q, k, v = (t.unflatten(0, (-1, longest)) for t in (q, k, v))
        return padded(q, k, v, bias).flatten(0, 1)
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and bias is None and _has_varlen():
        from torch.nn.attention.varlen import varlen_attn

        ends = packing.ends.int()
        out = varlen_attn(q, k, v, ends, ends, longest, longest)
        assert isinstance(out, Tensor)
        return out
    queries, keys, values = (
        t.unflatten(0, (-1, longest)).split(_TOGETHER)
        if even
        else [image[None] for image in t.split(packing.lengths)]
        for t in (q, k, v)
    )
    rows = itertools.repeat(None) if bias is None else bias.split(_TOGETHER if even else 1)
    parts = []
    for query, key, value, row in zip(queries, keys, values, rows, strict=False):
        row = None if row is None else row[..., : query.shape[1]]
        parts.append(padded(query, key, value, row).flatten(0, 1))
        if scores is not None:
            scores.append(first_scores(query, key).flatten(0, 1))
    return torch.cat(parts)


_TOGETHER = 16
"""Images of one length in a call on a CPU: more don't fit its caches, fewer waste calls."""


_IN_CACHE = 4096
"""Images times width of their heads whose products with the first query stay in the caches."""


def first_scores(q: Tensor, k: Tensor) -> Tensor:
    """``(B, n, heads, dim)`` -> ``(B, n, heads)`` products of each image's first query and keys."""
    # A sum of products reads the keys where they lie; a matrix product would copy them first.
    return torch.linalg.vecdot(k.float(), q[:, 0, None].float())


def _has_varlen() -> bool:
    return find_spec("torch.nn.attention.varlen") is not None


def class_row(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    packing: Packing | None,
    scores: list[Tensor] | None = None,
) -> Tensor:
    """Attention of the class token, mean over the heads.

    Dead keys leave the softmax of every head; masking after the mean would be another number.

    Args:
        q: ``(B, N, heads, dim)`` queries, the class token's first; packed: ``(T, heads, dim)``.
        k: keys, likewise.
        mask: as for :func:`padded`.
        packing: how the tokens are packed; None while they are not.
        scores: what :func:`packed` put there, if anything.

    Returns:
        ``(B, N)`` float32.
    """
    if packing is None and q.device.type == "cpu":
        few = max(_TOGETHER, _IN_CACHE // (q.shape[-2] * q.shape[-1]))
        starts = range(0, max(1, len(q)), few)  # an empty batch is one empty part
        parts = [slice(start, start + few) for start in starts]
        score = torch.cat([first_scores(q[part], k[part]) for part in parts])
    elif packing is None:
        score = first_scores(q, k)
    elif scores:
        score = packing.unpack(torch.cat(scores))
    else:
        own = q.index_select(0, packing.ends[:-1]).index_select(0, packing.image)
        score = packing.unpack((k.float() * own.float()).sum(-1))
    return _weights(score.transpose(1, 2)[:, :, None], q.shape[-1], mask).mean(1)[:, 0]


def matrix(q: Tensor, k: Tensor, mask: Tensor | None, packing: Packing | None) -> Tensor:
    """The whole attention of a block, as nobody but a graph method needs it.

    Args:
        q: as for :func:`class_row`.
        k: keys, likewise.
        mask: as for :func:`padded`.
        packing: how the tokens are packed; None while they are not.

    Returns:
        ``(B, heads, N, N)`` float32, from query to key; 0 for dead keys, anything for dead queries.
    """
    if packing is not None:
        q, k = packing.unpack(q), packing.unpack(k)
    return _weights(torch.einsum("bnhd,bmhd->bhnm", q, k), q.shape[-1], mask)


def _weights(score: Tensor, width: int, mask: Tensor | None) -> Tensor:
    """Products ``(B, heads, queries, N)`` of queries and keys as float32 attention."""
    score = score.float() * width**-0.5
    if mask is not None and mask.dtype == torch.bool:
        score = score.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        score = score + mask
    return score.softmax(-1)
