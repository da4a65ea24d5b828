"""DORA's critics, with one value per image; used in training only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from agents.policies.trainable import Columns
from tokenenv.game import Game
from tokenenv.game.dense import CONFIDENCE_DIM
from tokenenv.game.game import COURSE_DIM


class PrivilegedCritic(nn.Module):
    """A critic that reads all tokens, the dense model's logits and the progress of the episode.

    DORA-pruning's critic (arXiv 2609.34325, "Privileged critic"): a learned value token and the
    tokens, projected to ``width``, go through ``depth`` pre-LN Transformer blocks. The value token
    is concatenated with projections of the numbers about the episode and of the dense logits.
    There is one value per head of the actor; that of the selector also reads the budget. As in the
    paper it never reads the label: of the dense model's confidence in the true class, which is in
    the game's state, it takes no number, and computes those of :func:`certainty` from the logits.

    Args:
        game: a game made with ``privileged=True``.
        heads: the actor's heads; the value of the first does not depend on the choice.
        width: width of the Transformer; 256 in the paper.
        depth: number of its blocks; 2 in the paper; with 0 it does not read tokens.
    """

    def __init__(self, game: Game, heads: Sequence[str], width: int, depth: int) -> None:
        super().__init__()
        dim, classes = game.backbone.dim, game.backbone.classes
        course = game.state_dim - COURSE_DIM
        self._logits = slice(course - classes, course)
        self._labelled = slice(self._logits.start - CONFIDENCE_DIM, self._logits.start)
        self.about = nn.Sequential(nn.Linear(game.state_dim - classes, 64), nn.SiLU())
        self.dense = nn.Sequential(nn.Linear(classes, 64), nn.SiLU())
        self.value_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.project = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width))
        self.prefix = nn.Parameter(torch.zeros(game.backbone.prefix, width))
        self.place = nn.Linear(64, width)
        # About 64 numbers per attention head, as in the paper, if that divides the width.
        heads_of = max(h for h in range(1, max(1, width // 64) + 1) if width % h == 0)
        layers = [
            nn.TransformerEncoderLayer(
                width, heads_of, 2 * width, 0.0, "gelu", batch_first=True,
                norm_first=True,
            )
            for _ in range(depth)
        ]  # fmt: skip
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(width)
        read = 128 + (width if depth else 0)
        self.values = nn.ModuleDict({name: _value(read + (name == "selector")) for name in heads})

    def forward(self, seen: Columns, choice: Columns | None) -> dict[str, Tensor]:
        """A value ``(B, 1)`` for each head; without a choice only for the first."""
        state = seen["state"]
        logits = state[:, self._logits]
        own, course = state[:, : self._labelled.start], state[:, self._logits.stop :]
        about = self.about(torch.cat([own, certainty(logits), course], 1))
        parts = [about, self.dense(logits.log_softmax(1) / 4)]
        if len(self.layers):
            parts.append(self._read(seen["tokens"], about))
        return _values(self.values, torch.cat(parts, 1), choice)

    def _read(self, tokens: Tensor, about: Tensor) -> Tensor:
        """``(B, N, D)`` -> ``(B, width)`` the value token after the Transformer."""
        dead = (tokens == 0).all(2)
        x = self.project(tokens)
        x = torch.cat([x[:, : len(self.prefix)] + self.prefix, x[:, len(self.prefix) :]], 1)
        value = self.value_token + self.place(about)[:, None]
        x = torch.cat([value, x], 1)
        mask = torch.cat([torch.zeros_like(dead[:, :1]), dead], 1)
        # A process may have no rows of a minibatch, and torch's attention needs at least one.
        for layer in self.layers if len(x) else ():
            x = layer(x, src_key_padding_mask=mask)
        return self.norm(x[:, 0])


class SymmetricCritic(nn.Module):
    """A critic that reads only what the actor reads, for comparison with the privileged one.

    Its input is the shared features and the mean of the agents' own features.

    Args:
        game: the game.
        heads: the actor's heads.
    """

    def __init__(self, game: Game, heads: Sequence[str]) -> None:
        super().__init__()
        read = game.agent_dim + game.shared_dim
        self.values = nn.ModuleDict({name: _value(read + (name == "selector")) for name in heads})

    def forward(self, seen: Columns, choice: Columns | None) -> dict[str, Tensor]:
        """As :meth:`PrivilegedCritic.forward`."""
        weight = seen["active"] / seen["active"].sum(1, keepdim=True).clamp(min=1)
        mean = (seen["agents"] * weight[..., None]).sum(1)
        return _values(self.values, torch.cat([mean, seen["shared"]], 1), choice)


def certainty(logits: Tensor) -> Tensor:
    """How certain a model is of its own prediction, without the label.

    Args:
        logits: ``(B, K)``.

    Returns:
        ``(B, 3)`` probability of the most probable class, its margin to the second (0 with a single
        class), and the entropy of the prediction in nats.
    """
    p = logits.softmax(1)
    top = p.topk(min(2, p.shape[1]), 1).values
    entropy = -(p * p.clamp(min=1e-12).log()).sum(1, keepdim=True)
    return torch.cat([top[:, :1], top[:, :1] - top[:, -1:], entropy], 1)


def _values(heads: nn.ModuleDict, read: Tensor, choice: Columns | None) -> dict[str, Tensor]:
    """A value ``(B, 1)`` per head; the selector's needs the choice, whose share it reads, too."""
    values = {}
    for name, head in heads.items():
        if name != "selector":
            values[name] = head(read)
        elif choice is not None:
            values[name] = head(torch.cat([read, choice["share"]], 1))
    return values


def _value(inputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 128), nn.SiLU(), nn.Linear(128, 1))
