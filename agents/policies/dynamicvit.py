"""DynamicViT: token pruning by predictors that are trained by gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.policies.heuristics import keep_highest
from tokenenv.artefact import check_annotated
from tokenenv.errors import UserError
from tokenenv.game.checks import check_keep
from tokenenv.game.cost import linear_macs
from tokenenv.game.policy import Policy
from tokenenv.game.rules import Observation, TokenPrune
from tokenenv.game.rules.features import mean_over
from tokenenv.game.stored import describe, remake
from tokenenv.reducers.base import share
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.tokens import Tokens

_RATIO_WEIGHT = 2.0
"""Weight of the ratio loss (section 4.1: lambda_ratio)."""


class Predictor(nn.Module):
    """Log-probabilities of pruning and keeping each token (section 3.2, equations 1 to 4).

    Half of a token's features are its own, the other half is the mean over all kept tokens.

    Args:
        dim: width of a token.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.own = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        half, quarter = dim // 2, dim // 4
        self.out = nn.Sequential(
            nn.Linear(dim, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(),
            nn.Linear(quarter, 2),
        )  # fmt: skip

    def forward(self, tokens: Tensor, there: Tensor) -> Tensor:
        """Tokens ``(B, V, D)``, ``(B, V)`` which are kept -> log-probabilities ``(B, V, 2)``."""
        local, common = self.own(tokens).chunk(2, dim=-1)
        common = mean_over(common, there)[:, None].expand_as(common)
        return self.out(torch.cat([local, common], dim=-1)).log_softmax(-1)


class DynamicViTPolicy(nn.Module, Policy):
    """Rao et al., NeurIPS 2021: before some blocks the tokens with the highest keep score are kept.

    At each decision the ``ceil(keep n)`` best of an image's ``n`` tokens are kept. In training,
    tokens are pruned by Gumbel-softmax samples with a straight-through gradient, and a loss pulls
    the share of kept tokens towards ``keep``. Unlike in the paper, predictors read the tokens after
    the coming block's LayerNorm, as all agents here do.

    Args:
        rules: the rules; agents observe only their ``token``.
        dim: width of a token.
        keep: share of the visual tokens kept at each decision, in (0, 1].
        trained_on: timm's name of the backbone it is trained on.

    Raises:
        UserError: the share is out of its range, or the width is not a multiple of 4.
    """

    def __init__(self, rules: TokenPrune, dim: int, keep: float, trained_on: str = "") -> None:
        super().__init__()
        check_keep(keep)
        if dim % 4:
            raise UserError(f"DynamicViT's predictors need a width that 4 divides, not {dim}")
        self.rules, self.dim, self.keep, self.trained_on = rules, dim, keep, trained_on
        self.predictors = nn.ModuleList(Predictor(dim) for _ in rules.blocks)

    @torch.no_grad()
    def act(self, observation: Observation) -> Tensor:
        """``(B, A)`` int64, 1 for kept tokens."""
        score = self.predictors[observation.step](observation.agents, observation.active)[..., 1]
        return keep_highest(score, observation.active, self.keep)

    @torch.no_grad()
    def chances(self, observation: Observation) -> Tensor:
        """``(B, A)`` probability of pruning, as the predictor gives it."""
        return self.predictors[observation.step](observation.agents, observation.active).exp()[
            ..., 0
        ]

    def left(self, backbone: Backbone, step: int, visual: int) -> int:
        """``ceil(keep visual)``."""
        return share(visual, self.keep)

    soft = True

    def soft_play(self, backbone: Backbone, images: Tensor) -> tuple[Tokens, Tensor, Tensor]:
        """Run ``images (B, C, H, W)`` with sampled, differentiable decisions.

        Returns:
            All tokens after the last block; ``(B, V)`` 1 for the visual tokens that are kept
            (equations 5 to 7 and 10 to 11); the weighted ratio loss (equation 15).
        """
        tokens = backbone.embed(images)
        keep = torch.ones_like(tokens.visual_alive, dtype=torch.float32)
        prefix = keep.new_ones(len(keep), tokens.prefix)
        missed: list[Tensor] = []
        for block in range(backbone.depth):
            if block in self.rules.blocks:
                with torch.autocast(images.device.type, enabled=False):
                    seen = backbone.normalised(block, tokens.x.float())[:, tokens.prefix :]
                    chances = self.predictors[len(missed)](seen, keep)
                    keep = keep * F.gumbel_softmax(chances, hard=True)[..., 1]
                target = self.keep ** (len(missed) + 1)
                missed.append((keep.mean(1) - target).square().mean())
            if missed:
                tokens = backbone.attend_gated(block, tokens, torch.cat([prefix, keep], dim=1))
            else:
                tokens, _ = backbone.attend(block, tokens)
            tokens = backbone.feed(block, tokens)
        return tokens, keep, _RATIO_WEIGHT * torch.stack(missed).mean()

    def macs(self, agents: Tensor, removed: Tensor) -> Tensor:
        """Multiply-adds of one decision, see :meth:`tokenenv.Policy.macs`."""
        return agents * linear_macs(self.predictors[0])

    def check_fit(self, backbone: Backbone, name: str) -> None:
        """Raise :class:`UserError` unless the policy reads tokens of the model's width."""
        super().check_fit(backbone, name)
        if backbone.dim != self.dim:
            raise UserError(
                f"the policy was trained for '{self.trained_on}' (tokens of width {self.dim}) and "
                f"model '{name}' has width {backbone.dim}: use it with the model it was trained on"
            )

    def config(self) -> dict[str, Any]:
        """All settings but the weights, as JSON."""
        return {
            "class": "DynamicViTPolicy",
            "rules": describe(self.rules),
            "dim": self.dim,
            "keep": self.keep,
            "trained_on": self.trained_on,
        }

    @classmethod
    def remade(cls, config: dict[str, Any], trust: bool = False) -> DynamicViTPolicy:
        """An untrained policy with the settings of :meth:`config`."""
        rules = remake(config.pop("rules"), [TokenPrune], trust)
        check_annotated(config, cls.__init__)
        return cls(rules, **config)
