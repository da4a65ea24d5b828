"""Mask modules: which share of each token goes into which merged token.

A mask ``G (B, N, P)`` has columns that sum to one: the merged tokens ``G^T Z`` (LTM, figure of the
block) are convex mixes of the ``N`` tokens. The paper's equations 3 and 4 are not public; the
modules here are built on what its figure, its bound's gradient (a linear layer on Z) and a review
of it say (a hard selection times a soft mask).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenenv.errors import UserError
from tokenenv.ltm.schedule import Grid, centres, closeness

_SHARPNESS = 8.0  # of the linear mask's start: a token one step away weighs exp(-8)
_GAIN = 3.0  # of the attention mask's start, see AttentionMask
_TINY = 1e-6


class Mask(nn.Module):
    """What all masks share: the earlier mask, hard assignment, normalised columns.

    Args:
        dim: width of the tokens.
        recursive: whether the mask of the block before, where it has the same shape, is carried
            on: ``carry * log G`` is added to the logits. ``carry`` is learned and starts at 0.
        hard: whether each token goes into one merged token only, with its soft weight. Backward
            the mask is soft (straight-through).
    """

    def __init__(self, dim: int, *, recursive: bool, hard: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.hard = hard
        self.carry = nn.Parameter(torch.zeros(())) if recursive else None

    def forward(self, z: Tensor, grid: Grid, smaller: Grid, previous: Tensor | None) -> Tensor:
        """The mask of ``z``, in its dtype.

        Args:
            z: ``(B, N, D)`` tokens between attention and MLP.
            grid: their rows and columns.
            smaller: rows and columns of the P merged tokens.
            previous: the mask of the block before, or None.

        Returns:
            ``(B, N, P)``, positive; each column sums to one.
        """
        logits = self.logits(self.norm(z), grid, smaller).float()
        if self.carry is not None and previous is not None and previous.shape == logits.shape:
            logits = logits + self.carry * previous.float().clamp(min=_TINY).log()
        g = self.normalised(logits)
        return (_hardened(g) if self.hard else g).to(z.dtype)

    def logits(self, z: Tensor, grid: Grid, smaller: Grid) -> Tensor:
        """``(B, N, P)`` of normalised tokens ``z``."""
        raise NotImplementedError

    def normalised(self, logits: Tensor) -> Tensor:
        """The soft mask of its logits."""
        raise NotImplementedError


class LinearMask(Mask):
    """``S = prior + LN(Z) W`` with ``W (D, P)``; G is the softmax over the tokens of each column.

    ``W`` starts at zero and the prior, fixed, favours the tokens around each merged token's own
    place: the start is a resampling of the tokens. Without it all merged tokens would start as
    the same mean. The number of merged tokens is that of the weights: one image size only.
    """

    def __init__(self, dim: int, tokens: int, *, recursive: bool = False, hard: bool = False):
        super().__init__(dim, recursive=recursive, hard=hard)
        self.score = nn.Linear(dim, tokens, bias=False)
        nn.init.zeros_(self.score.weight)

    def logits(self, z: Tensor, grid: Grid, smaller: Grid) -> Tensor:
        """``(B, N, P)`` prior and learned part.

        Raises:
            UserError: the image asks for another number of merged tokens than there are weights.
        """
        if smaller[0] * smaller[1] != self.score.out_features:
            raise UserError(
                f"the linear mask has weights for {self.score.out_features} merged tokens and this "
                f"image size asks for {smaller[0] * smaller[1]}: give images of the size it was "
                "built for, or use mask='attention'"
            )
        return self.score(z) + _SHARPNESS * closeness(grid, smaller, z.device).to(z.dtype)

    def normalised(self, logits: Tensor) -> Tensor:
        """Softmax over the tokens."""
        return logits.softmax(1)


class AttentionMask(Mask):
    """Each token spreads over the P centres by similarity, at any resolution.

    Centres are tokens on an even grid; ``A = softmax_p(q(z_n) . k(z_p) / sqrt(width))`` and G is A
    with its columns normalised. ``q`` and ``k`` start as the same projection with orthonormal
    rows, scaled: a sharp cosine similarity in fewer dimensions, so that a pretrained network is
    disturbed little (with the usual small start G would be uniform and all merged tokens equal).

    Args:
        dim: width of the tokens.
        width: of queries and keys; at most ``dim``.
        recursive, hard: as for :class:`Mask`.
    """

    def __init__(self, dim: int, width: int = 32, *, recursive: bool = False, hard: bool = False):
        super().__init__(dim, recursive=recursive, hard=hard)
        width = min(width, dim)
        self.query = nn.Linear(dim, width, bias=False)
        self.key = nn.Linear(dim, width, bias=False)
        self.scale = width**-0.5
        nn.init.orthogonal_(self.query.weight, gain=_GAIN)
        with torch.no_grad():
            self.key.weight.copy_(self.query.weight)

    def logits(self, z: Tensor, grid: Grid, smaller: Grid) -> Tensor:
        """``(B, N, P)`` scaled products of queries and the centres' keys."""
        middle = self.centre_keys(z, grid, smaller)
        return (self.query(z) * self.scale) @ middle.transpose(1, 2)

    def centre_keys(self, z: Tensor, grid: Grid, smaller: Grid) -> Tensor:
        """``(B, P, width)`` keys of the centres."""
        return self.key(z[:, centres(grid, smaller, z.device)])

    def normalised(self, logits: Tensor) -> Tensor:
        """Softmax over the centres, then columns to one."""
        share = logits.softmax(2)
        return share / share.sum(1, keepdim=True).clamp(min=_TINY)


class SimilarMask(AttentionMask):
    """An attention mask whose centres are each image's own: all but what others resemble most.

    As in ToMe (Bolya et al., ICLR 2023, section 3) every other token may go; those of them go
    whose key has the largest cosine to a key of the tokens that stay, so half of the tokens at
    most. A hard choice, times soft weights which alone have a gradient: what a review of the paper
    says of its masks. The merged tokens keep their order and lie on no grid.
    """

    def centre_keys(self, z: Tensor, grid: Grid, smaller: Grid) -> Tensor:
        """``(B, P, width)`` keys of the centres."""
        keys = self.key(z)
        unit = F.normalize(keys.detach().float(), dim=-1)
        likeness = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).amax(2)
        gone = z.shape[1] - smaller[0] * smaller[1]
        stays = torch.ones(z.shape[:2], dtype=torch.int64, device=z.device)
        stays.scatter_(1, 2 * likeness.topk(gone, dim=1).indices, 0)
        # Stable: the centres first, in their order.
        chosen = stays.argsort(dim=1, descending=True, stable=True)[:, : z.shape[1] - gone]
        return keys.gather(1, chosen[..., None].expand(-1, -1, keys.shape[2]))


def check_half(tokens: int, left: int) -> None:
    """Refuse a merge that :class:`SimilarMask` can't do.

    Raises:
        UserError: less than half of the tokens shall be left.
    """
    if left < tokens // 2:
        raise UserError(
            f"mask='similar' leaves at least half of a block's {tokens} tokens, not {left}: take a "
            "higher ratio, more blocks, or mask='attention'"
        )


def merge(g: Tensor, z: Tensor) -> Tensor:
    """``X~ = G^T Z``: ``(B, N, P)`` and ``(B, N, D)`` -> ``(B, P, D)``."""
    return g.transpose(1, 2) @ z


def unmerge(g: Tensor, merged: Tensor) -> Tensor:
    """``z_n = sum_p G_np x~_p`` with rows of G normalised: ``(B, P, D)`` -> ``(B, N, D)``."""
    return (g / g.sum(2, keepdim=True).clamp(min=_TINY)) @ merged


def _hardened(g: Tensor) -> Tensor:
    """Each token only in its strongest merged token; one that nobody chose stays a soft mix."""
    chosen = torch.zeros_like(g).scatter_(2, g.argmax(2, keepdim=True), 1.0) * g
    chosen = torch.where(chosen.sum(1, keepdim=True) > 0, chosen, g)
    chosen = chosen / chosen.sum(1, keepdim=True).clamp(min=_TINY)
    return g + (chosen - g).detach()
