"""From the keyword arguments that all faces share to a :class:`~tokenenv.game.Game`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal

import torch

from tokenenv.data import ImageSource, Split, open_source
from tokenenv.errors import UserError
from tokenenv.game import Game
from tokenenv.game.checks import spread_blocks
from tokenenv.game.episode import Execution
from tokenenv.game.rewards import AlphaBeta, Cooperative, Dora, KeepTarget, Reward
from tokenenv.game.rules import LayerMerge, LayerPrune, Rules, TokenPrune
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.load import EMBEDDED, load_backbone

RulesName = Literal["token_prune", "layer_merge", "layer_prune"]
RewardName = Literal["alpha_beta", "keep_target", "cooperative", "dora"]

_RULES: dict[str, Any] = {
    "token_prune": TokenPrune,
    "layer_merge": LayerMerge,
    "layer_prune": LayerPrune,
}
_TOKEN_REWARDS: dict[str, Any] = {
    "alpha_beta": AlphaBeta,
    "keep_target": KeepTarget,
    "cooperative": Cooperative,
}
_LAYER_REWARDS: dict[str, Any] = {"dora": Dora}

_DEFAULT_DECISIONS = 3
# RL4EViT's code takes alpha = 24 for the 196 tokens of a 224-pixel image. What a survivor earns
# is alpha / survivors, so alpha grows with the number of tokens where the balance of gain and
# price shall be at the same share of them.
_ALPHA_PER_TOKEN = 24.0 / 196
_KEEP_PER_DECISION = 0.7


def build_game(
    *,
    rules: RulesName = "token_prune",
    model: str | Backbone = EMBEDDED,
    weights: str | None = None,
    data: str | ImageSource | None = None,
    split: Split = "train",
    blocks: Sequence[int] | None = None,
    max_cycles: int | None = None,
    reward: RewardName | Reward | None = None,
    reward_kwargs: dict[str, Any] | None = None,
    device: str = "cpu",
    dtype: str | torch.dtype = "float32",
    execution: Execution | None = None,
    batch_size: int = 1,
    repeats: int = 1,
    privileged: bool = False,
    **settings: Any,
) -> Game:
    """Build the game that an environment shows.

    Args:
        rules: ``token_prune``, ``layer_merge`` or ``layer_prune``.
        model: a name that :func:`~tokenenv.vit.load.load_backbone` knows, or a ready backbone,
            which several environments may share.
        weights: a file of weights for a model given by name.
        data: a folder or data set name that :func:`~tokenenv.data.open_source` knows, or a ready
            source; None: the embedded digits.
        split: which part of ``data`` to open where it has parts; a ready source is taken as it is.
        blocks: the decision blocks; None: ``max_cycles`` of them, spread evenly over the model.
        max_cycles: decisions per episode; None: as many as ``blocks``, or 3 for ``token_prune``
            and one for each block otherwise.
        reward: a name, or any :class:`~tokenenv.game.rewards.Reward`; None: ``alpha_beta`` for
            ``token_prune`` and ``dora`` otherwise.
        reward_kwargs: parameters of a reward given by name, in place of its defaults. Those are
            the reward class's own, but for ``alpha``, ``24 * P / 196`` for ``P`` tokens (it keeps
            the equilibrium share of tokens of RL4EViT's code), and keep-target's ``targets``,
            ``0.7 ** (i + 1)`` after decision ``i``.
        device: where to put a model given by name; a ready backbone stays where it is.
        dtype: what a model given by name computes in: ``float32``, ``bfloat16`` or ``float16``;
            observations and rewards are float32 all the same.
        execution: ``masked``, ``padded`` or ``packed``; None takes what suits the device.
        batch_size: images per episode, repeats counted.
        repeats: how many times in a row each image is in the batch.
        privileged: whether observations hold what DORA's critic reads, see
            :class:`~tokenenv.game.Game`.
        **settings: of the rules, such as ``features``; see :class:`~tokenenv.TokenPrune`,
            :class:`~tokenenv.LayerMerge` and :class:`~tokenenv.LayerPrune`.

    Raises:
        UserError: a value that is unknown or doesn't go with the others.
    """
    if isinstance(model, str):
        backbone = load_backbone(model, weights, device, dtype)
    elif weights is None:
        backbone = model
    else:
        raise UserError(
            f"weights '{weights}' go with a model's name: leave them out for a backbone"
        )
    game_rules = build_rules(rules, backbone.depth, blocks, max_cycles, settings)
    game_rules.check(backbone)
    if not isinstance(data, ImageSource):
        data = open_source(data, backbone.model, split=split)
    return Game(
        backbone,
        game_rules,
        build_reward(reward, reward_kwargs, game_rules, backbone.patches),
        data,
        batch_size=batch_size,
        repeats=repeats,
        execution=execution,
        privileged=privileged,
    )


def build_rules(
    name: RulesName,
    depth: int,
    blocks: Sequence[int] | None,
    max_cycles: int | None,
    settings: dict[str, Any],
) -> TokenPrune | LayerMerge | LayerPrune:
    """Rules by name for a model of ``depth`` blocks.

    Raises:
        UserError: unknown name or setting, or a value out of its range.
    """
    if name not in _RULES:
        raise UserError(f"unknown rules '{name}': choose from {', '.join(_RULES)}")
    cls = _RULES[name]
    known = [field.name for field in fields(cls) if field.name != "blocks"]
    for key in settings:
        if key not in known:
            raise UserError(
                f"unknown argument '{key}': the rules take {', '.join(known)}; what a reward takes "
                "goes into reward_kwargs={...}"
            )
    # Lists come from JSON and from users; rules are hashable.
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    made: TokenPrune | LayerMerge | LayerPrune = cls(
        blocks=decision_blocks(depth, blocks, max_cycles, cls.between), **values
    )
    return made


def decision_blocks(
    depth: int, blocks: Sequence[int] | None, max_cycles: int | None, between: bool = False
) -> tuple[int, ...]:
    """The blocks of a model of ``depth`` blocks before which, or in which, agents decide.

    Raises:
        UserError: ``max_cycles`` isn't the number of ``blocks``, or too many for the model.
    """
    if blocks is None and between:
        count = depth if max_cycles is None else max_cycles
        if not 1 <= count <= depth:
            raise UserError(
                f"max_cycles={count} decisions don't fit the model's {depth} blocks: "
                f"choose 1 to {depth}"
            )
        return tuple(round((i + 1) * depth / count) - 1 for i in range(count))
    if blocks is None:
        count = _DEFAULT_DECISIONS if max_cycles is None else max_cycles
        if not 1 <= count < depth:
            raise UserError(
                f"max_cycles={count} decisions don't fit between the model's {depth} blocks: "
                f"choose 1 to {depth - 1}"
            )
        return spread_blocks(depth, count)
    if max_cycles not in (None, len(blocks)):
        raise UserError(
            f"max_cycles={max_cycles} but {len(blocks)} decision blocks are given: "
            "leave one of the two out"
        )
    return tuple(blocks)


def build_reward(
    reward: RewardName | Reward | None, kwargs: dict[str, Any] | None, rules: Rules, patches: int
) -> Reward:
    """A reward by name with defaults for these rules and ``patches`` patches, or itself.

    Raises:
        UserError: unknown name or parameter, or parameters for a reward that is no name.
    """
    rewards = _LAYER_REWARDS if rules.between else _TOKEN_REWARDS
    if reward is None:
        reward = "dora" if rules.between else "alpha_beta"
    if not isinstance(reward, str):
        if kwargs:
            raise UserError(
                f"reward_kwargs go with a reward's name: give them to {type(reward).__name__}()"
            )
        return reward
    if reward not in rewards:
        raise UserError(f"unknown reward '{reward}': choose from {', '.join(rewards)}")
    kwargs = kwargs or {}
    cls, steps = rewards[reward], len(rules.blocks)
    known = [field.name for field in fields(cls)]
    for name in kwargs:
        if name not in known:
            raise UserError(
                f"reward '{reward}' has no parameter '{name}': choose from {', '.join(known)}"
            )
    defaults: dict[str, Any] = {}
    if cls in (AlphaBeta, KeepTarget):
        defaults["alpha"] = _ALPHA_PER_TOKEN * patches
    if cls is KeepTarget:
        defaults["targets"] = tuple(_KEEP_PER_DECISION ** (i + 1) for i in range(steps))
    made: Reward = cls(**(defaults | kwargs))
    if isinstance(made, KeepTarget):
        made.check(steps)
    return made
