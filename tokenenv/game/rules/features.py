"""Features of tokens that have the same scale in every model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenenv.vit.backbone import Context
from tokenenv.vit.kept import kept
from tokenenv.vit.reduction import normalised
from tokenenv.vit.tokens import Tokens


def mean_over(values: Tensor, active: Tensor) -> Tensor:
    """Mean of ``values (B, A, D)`` over the active entries ``(B, A)``: ``(B, D)``."""
    weight = active / active.sum(1, keepdim=True).clamp(min=1)
    return (values * weight[..., None]).sum(1)


def log_relative(values: Tensor, active: Tensor) -> Tensor:
    """Log of positive ``values (B, A)`` relative to their mean over the active entries.

    Returns:
        ``(B, A, 1)``, at least -4; 0 for inactive entries.
    """
    weight = active.to(values.dtype)
    mean = (values * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp_(min=1)
    relative = values / mean.clamp_(min=1e-12)
    return relative.clamp_(min=1e-12).log_().clamp_(min=-4.0).mul_(weight)[..., None]


def cosines(vectors: Tensor) -> Tensor:
    """Cosines ``(B, A, A)`` of all pairs of vectors ``(B, A, D)``, in float32."""
    unit = normalised(vectors)
    return unit @ unit.transpose(1, 2)


def redundancy(tokens: Tokens, context: Context) -> Tensor:
    """How similar each visual token is to a token with more of the class token's attention.

    Returns:
        ``(B, A, 1)`` the highest cosine of its mean-head key with the key of such a token; -1 for
        the token with the most attention.
    """
    assert context.mean_keys is not None and context.cls_attention is not None
    rank = context.cls_attention[:, tokens.prefix :] * tokens.visual_alive
    better = rank[:, None, :] > rank[:, :, None]
    cosine = cosines(context.mean_keys[:, tokens.prefix :]).masked_fill(~better, -1.0)
    # One more column, so that the maximum exists if no visual token is left.
    return F.pad(cosine, (0, 1), value=-1.0).amax(2)[..., None]


def whole_numbers(values: tuple[int, ...], device: torch.device) -> Tensor:
    """``(n,)`` int64, kept on the device, because each copy from the host would synchronise."""
    return kept(_whole_numbers, values, device)


def _whole_numbers(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def one_hots(count: int, device: torch.device) -> Tensor:
    """``(count, count)`` float32 identity, kept on the device."""
    return kept(_one_hots, count, device)


def _one_hots(count: int, device: torch.device) -> Tensor:
    return torch.eye(count, device=device)


def position_code(grid: tuple[int, int], device: torch.device) -> Tensor:
    """``(P, 8)`` sine and cosine of row and column at two wavelengths, row-major patches."""
    return kept(_position_code, grid, device)


def _position_code(grid: tuple[int, int], device: torch.device) -> Tensor:
    rows = torch.linspace(0, 1, grid[0], device=device)[:, None].expand(grid)
    cols = torch.linspace(0, 1, grid[1], device=device)[None, :].expand(grid)
    angle = torch.stack([rows, cols], dim=-1).reshape(-1, 2) * torch.pi
    angle = torch.cat([angle, 2 * angle], dim=-1)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
