"""Recorded episodes: what each decision of a method leaves of some images, and what it cost."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenenv.data import Batch, ImageSource
from tokenenv.errors import UserError
from tokenenv.game.build import build_reward
from tokenenv.game.cost import Cost
from tokenenv.game.episode import Episode
from tokenenv.game.game import Game
from tokenenv.game.policy import Method, Policy
from tokenenv.game.reduction import Moment
from tokenenv.vit.backbone import Backbone


@dataclass(frozen=True)
class Step:
    """``B`` images before the first decision of a method, or after one of them.

    Attributes:
        block: the decision's block; None before the first decision.
        owners: ``(B, P)`` the number of the token that stands for each patch, -1 for a pruned one.
        tokens: ``(B,)`` visual tokens left.
        macs: ``(B,)`` multiply-adds of the whole pass if no further decision is taken, those of the
            decisions so far included (1 MAC = 1 FLOP).
        probabilities: ``(B, K)`` of the classes, if no further decision is taken.
        chance: ``(B, P)`` probability with which the agent of each patch's token chose to remove
            it in this decision, NaN where no agent acted; None for methods that have none.
        reward: ``(B, P)`` reward of the agent of each patch for this decision, the same for all
            patches where the agents share it; None before the first decision and without agents.
    """

    block: int | None
    owners: NDArray[np.int64]
    tokens: NDArray[np.int64]
    macs: NDArray[np.float64]
    probabilities: NDArray[np.float32]
    chance: NDArray[np.float32] | None = None
    reward: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Recorded:
    """The episodes of a method on ``B`` images.

    Attributes:
        grid: rows and columns of patches.
        between: whether decisions are taken inside a block, between attention and MLP; else they
            are taken before it.
        merges: whether any of the images had tokens merged.
        dense_macs: multiply-adds of the dense model for one image.
        reward: name of the reward that the agents got, the default of their rules; empty without
            agents.
        steps: before the first decision, and after each one.
    """

    grid: tuple[int, int]
    between: bool
    merges: bool
    dense_macs: float
    reward: str
    steps: list[Step]

    @property
    def blocks(self) -> list[int]:
        """The decision blocks."""
        return [step.block for step in self.steps if step.block is not None]

    def at(self, block: int | None) -> Step:
        """The state after the last decision up to ``block``; None: before the first one."""
        last = -1 if block is None else block
        return [s for s in self.steps if s.block is None or s.block <= last][-1]

    def saved(self, step: Step) -> NDArray[np.float64]:
        """``(B,)`` share of the dense model's multiply-adds saved so far, percent."""
        return 100 * (1 - step.macs / self.dense_macs)


@torch.inference_mode()
def record(backbone: Backbone, method: Method, source: ImageSource, batch: Batch) -> Recorded:
    """Play a method deterministically on the images of a batch, and keep every step.

    Agents get the default reward of their rules. A random method starts from its seed.

    Args:
        backbone: the model that the method runs on.
        method: a policy or a reducer that decides in some blocks.
        source: where the images are from.
        batch: the images; where a label is below 0, the class is unknown, and rewards take the
            dense model's for it.

    Raises:
        UserError: a policy gives probabilities of another shape than its actions.
    """
    method = copy.deepcopy(method)
    if isinstance(method, Policy):
        return _play_game(backbone, method, source, batch)
    cost, images = Cost(backbone), batch.images.to(backbone.device, backbone.dtype)
    episode = Episode(backbone, method.reduction, images, execution="masked")
    steps = [_step(episode, method, cost)]
    while not episode.done:
        episode.act(method.next_action(episode))
        steps.append(_step(episode, method, cost))
    return _recorded(episode, method, cost, "", steps)


def _play_game(backbone: Backbone, policy: Policy, source: ImageSource, batch: Batch) -> Recorded:
    """:func:`record` for a method with agents, whose chances and rewards are kept, too."""
    rules, cost = policy.rules, Cost(backbone)
    reward = build_reward(None, None, rules, backbone.patches)
    game = Game(backbone, rules, reward, source, batch_size=len(batch.index), execution="masked")
    if (batch.labels < 0).any():
        images = batch.images.to(backbone.device, backbone.dtype)
        known = torch.where(batch.labels < 0, backbone(images).argmax(1).cpu(), batch.labels)
        batch = batch._replace(labels=known)
    game.reset(batch)
    episode = game.episode
    assert episode is not None
    steps = [_step(episode, policy, cost)]
    while not episode.done:
        moment, chance = episode.moment, policy.chances(episode.observe())
        action = policy.next_action(episode)
        if chance is not None and chance.shape not in (action.shape, action[:, :1].shape):
            raise UserError(
                f"{type(policy).__name__}.chances() gave {tuple(chance.shape)} for actions "
                f"{tuple(action.shape)}: give one probability for each action, or for each image"
            )
        given = game.step(rules.to_roster(backbone, moment.tokens, action)).reward
        if given.shape[1] > 1 and not rules.token_agents:
            given = on_patches(moment, rules.from_roster(moment.tokens, given))
        steps.append(
            _step(
                episode, policy, cost,
                chance=None if chance is None else on_patches(moment, chance),
                reward=given.expand(-1, backbone.patches),
            )
        )  # fmt: skip
    return _recorded(episode, policy, cost, rules.default_reward, steps)


def on_patches(moment: Moment, values: Tensor) -> Tensor:
    """What the agents of a decision have, for each patch.

    Args:
        moment: the state when the decision was due.
        values: ``(B, 1)`` of one agent per image; else one for each candidate pair, if the rules
            matched tokens, or for each visual token.

    Returns:
        ``(B, P)`` float32: the value of the patch's token; NaN if that has no agent.
    """
    tokens = moment.tokens
    owners = tokens.owners
    if values.shape[1] == 1:
        each = values.float().expand(owners.shape)
    else:
        every = tokens.size.new_full(tokens.size.shape, torch.nan)
        if moment.match is None:
            every[:, tokens.prefix :] = values.float()
        else:
            real = moment.match.score > -torch.inf
            own = torch.where(real, values.float(), torch.nan)
            every = every.scatter(1, moment.match.token, own)
        each = every.gather(1, owners.clamp(min=0))
    return torch.where(owners >= 0, each, torch.nan)


def _step(
    episode: Episode,
    method: Method,
    cost: Cost,
    chance: Tensor | None = None,
    reward: Tensor | None = None,
) -> Step:
    everyone = torch.arange(len(episode.counts[-1]), device=episode.counts[-1].device)
    taken = episode.step
    return Step(
        block=method.reduction.blocks[taken - 1] if taken else None,
        owners=episode.tokens.owners.cpu().numpy().astype(np.int64),
        tokens=episode.counts[-1].cpu().numpy(),
        macs=macs_so_far(episode, method, cost).cpu().numpy(),
        probabilities=episode.finish(everyone).float().softmax(1).cpu().numpy(),
        chance=None if chance is None else chance.cpu().numpy(),
        reward=None if reward is None else reward.float().cpu().numpy(),
    )


def _recorded(
    episode: Episode, method: Method, cost: Cost, reward: str, steps: list[Step]
) -> Recorded:
    between, merges = method.reduction.between, episode.tokens.merged
    return Recorded(episode.backbone.grid, between, merges, cost.dense(), reward, steps)


def macs_so_far(episode: Episode, method: Method, cost: Cost) -> Tensor:
    """``(B,)`` multiply-adds of the whole pass if no further decision were taken.

    Those of the decisions taken are counted, too.
    """
    depth, count = episode.backbone.depth, episode.counts[-1] + episode.backbone.prefix
    attended = episode.attended + [count] * (depth - len(episode.attended))
    fed = episode.fed + [count] * (depth - len(episode.fed))
    total = cost.backbone_macs(attended, fed)
    return total + cost.decision_macs(method, attended, fed, episode.step)
