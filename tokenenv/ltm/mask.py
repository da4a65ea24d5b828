"""Mask modules: the weight of each token in each merged token.

The columns of a mask ``G (B, N, P)`` sum to one, so the merged tokens ``G^T Z`` (LTM, figure of
the block) are convex combinations of the ``N`` tokens. The paper's equations 3 and 4 are not
public. The modules here follow its figure, the gradient of its bound (a linear layer on Z) and a
review (a hard selection times a soft mask).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenenv.errors import UserError
from tokenenv.ltm.schedule import Grid, centres, closeness

_SHARPNESS = 8.0  # the initial linear mask gives a token one step away the weight exp(-8)
_GAIN = 3.0  # gain of the initial attention mask's projection, see AttentionMask
_TINY = 1e-6


class Mask(nn.Module):
    """The base class of masks: recursion, hard assignment, normalised columns.

    Args:
        dim: width of the tokens.
        recursive: whether to add ``carry * log G`` to the logits, with G the mask of the block
            before, if it has the same shape. ``carry`` is learned and starts at 0.
        hard: whether each token has a weight, its soft one, in a single merged token only. The
            backward pass uses the soft mask (straight-through).
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
            grid: rows and columns of the N tokens.
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
        """``(B, N, P)`` logits of the mask from normalised tokens ``z (B, N, D)``."""
        raise NotImplementedError

    def normalised(self, logits: Tensor) -> Tensor:
        """The soft mask ``(B, N, P)`` from its logits; columns sum to one."""
        raise NotImplementedError


class LinearMask(Mask):
    """``S = prior + LN(Z) W`` with ``W (D, P)``; G is the softmax over the tokens of each column.

    ``W`` starts at zero. The fixed prior favours the tokens near each merged token's position, so
    the initial mask resamples the grid; without it all merged tokens would start as the same mean.
    The number of merged tokens is fixed by the shape of ``W``, so it works at one image size only.
    """

    def __init__(self, dim: int, tokens: int, *, recursive: bool = False, hard: bool = False):
        super().__init__(dim, recursive=recursive, hard=hard)
        self.score = nn.Linear(dim, tokens, bias=False)
        nn.init.zeros_(self.score.weight)

    def logits(self, z: Tensor, grid: Grid, smaller: Grid) -> Tensor:
        """``(B, N, P)`` prior plus learned part.

        Raises:
            UserError: the image size needs another number of merged tokens than W has.
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
    """Each token is divided among P centres by similarity, at any resolution.

    Centres are tokens on an even grid; ``A = softmax_p(q(z_n) . k(z_p) / sqrt(width))`` and G is A
    with its columns normalised. ``q`` and ``k`` start as the same projection with orthonormal
    rows, scaled: a sharp cosine similarity in fewer dimensions, so that a pretrained network
    changes little. (With the usual small initial weights G would be uniform and all merged tokens
    equal.)

    Args:
        dim: width of the tokens.
        width: width of queries and keys; at most ``dim``.
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
        """Softmax over the centres, then columns normalised to sum to one."""
        share = logits.softmax(2)
        return share / share.sum(1, keepdim=True).clamp(min=_TINY)


class SimilarMask(AttentionMask):
    """An attention mask whose centres are chosen in each image, by similarity as in ToMe.

    As in ToMe (Bolya et al., ICLR 2023, section 3) every second token is a candidate, and the
    candidates whose key has the largest cosine with a key of the other tokens are no centres; at
    most half of the tokens. The hard choice of centres has no gradient, the soft weights have one,
    as a review of the paper describes its masks. The merged tokens are in the order of their
    centres and lie on no grid.
    """

    def centre_keys(self, z: Tensor, grid: Grid, smaller: Grid) -> Tensor:
        """``(B, P, width)`` keys of the centres."""
        keys = self.key(z)
        unit = F.normalize(keys.detach().float(), dim=-1)
        likeness = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).amax(2)
        gone = z.shape[1] - smaller[0] * smaller[1]
        stays = torch.ones(z.shape[:2], dtype=torch.int64, device=z.device)
        stays.scatter_(1, 2 * likeness.topk(gone, dim=1).indices, 0)
        # A stable sort puts the centres first, in their order.
        chosen = stays.argsort(dim=1, descending=True, stable=True)[:, : z.shape[1] - gone]
        return keys.gather(1, chosen[..., None].expand(-1, -1, keys.shape[2]))


def check_half(tokens: int, left: int) -> None:
    """Check that :class:`SimilarMask` can do a merge.

    Raises:
        UserError: less than half of the tokens would be left.
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
    """Keep each token's largest weight only; a column without any keeps its soft weights."""
    chosen = torch.zeros_like(g).scatter_(2, g.argmax(2, keepdim=True), 1.0) * g
    chosen = torch.where(chosen.sum(1, keepdim=True) > 0, chosen, g)
    chosen = chosen / chosen.sum(1, keepdim=True).clamp(min=_TINY)
    return g + (chosen - g).detach()
