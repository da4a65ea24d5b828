"""Build a :class:`~tokenenv.game.Game` from the keyword arguments that all environments share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from tokenenv.artefact import Unfit, check_annotated
from tokenenv.data import ImageSource, Split, open_source
from tokenenv.errors import UnknownArgument, UserError, check_choice, did_you_mean
from tokenenv.game.checks import MOST_IMAGES, check_whole
from tokenenv.game.episode import Execution
from tokenenv.game.game import Game
from tokenenv.game.rewards import REWARDS, Reward, Turn, as_reward
from tokenenv.game.rules import RULES, Rules
from tokenenv.paths import path_text
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.load import EMBEDDED, load_backbone


def build_game(
    *,
    rules: str | Rules = "token_prune",
    model: str | Backbone = EMBEDDED,
    weights: str | None = None,
    data: str | ImageSource | None = None,
    split: Split = "train",
    blocks: Sequence[int] | None = None,
    max_cycles: int | None = None,
    reward: str | Reward | Callable[[Turn], Tensor] | None = None,
    reward_kwargs: dict[str, Any] | None = None,
    device: str = "cpu",
    dtype: str | torch.dtype = "float32",
    execution: Execution | None = None,
    batch_size: int = 1,
    repeats: int = 1,
    privileged: bool = False,
    **settings: Any,
) -> Game:
    """Build a game; environments pass their keyword arguments on to this function.

    Args:
        rules: ``token_prune``, ``layer_merge``, ``layer_prune``, a name given to
            :func:`~tokenenv.game.rules.register_rules`, or an instance of rules, which has its
            blocks and settings already.
        model: a name that :func:`~tokenenv.vit.load.load_backbone` knows, or a backbone, which
            several environments may share.
        weights: a file of weights for a model given by name.
        data: a folder or data set name that :func:`~tokenenv.data.open_source` knows, or an image
            source; None: those that belong to the model, digits or scenes.
        split: which part of ``data`` to open if it has parts: ``train``, ``test`` or, of the
            scenes, ``validation``; ignored for an image source.
        blocks: the decision blocks; None: ``max_cycles`` of them, spread evenly over the model.
        max_cycles: decisions per episode; None: as many as ``blocks``, or 3 for ``token_prune``
            and one for each block otherwise.
        reward: a name, any :class:`~tokenenv.game.rewards.Reward`, or a function of a
            :class:`~tokenenv.game.rewards.Turn`; None: the rules' own, ``alpha_beta`` for
            ``token_prune`` and ``dora`` otherwise.
        reward_kwargs: parameters of a reward given by name, in place of its defaults. The defaults
            are those of the reward's class, except for ``alpha``, ``24 * P / 196`` for ``P`` tokens
            (so that the equilibrium share of tokens is that of RL4EViT's code), and the
            ``targets`` of ``keep_target``, ``0.7 ** (i + 1)`` after decision ``i``.
        device: where to put a model given by name; a given backbone stays where it is.
        dtype: the precision of a model given by name: ``float32``, ``bfloat16`` or ``float16``.
            Observations and rewards are always float32.
        execution: ``masked``, ``padded`` or ``packed``; None: by device, see
            :func:`~tokenenv.game.episode.default_execution`.
        batch_size: images per episode, repeats included.
        repeats: how many times in a row each image is in the batch.
        privileged: whether observations hold what DORA's critic reads, see
            :class:`~tokenenv.game.Game`.
        **settings: settings of the rules, such as ``features``; see :class:`~tokenenv.TokenPrune`,
            :class:`~tokenenv.LayerMerge` and :class:`~tokenenv.LayerPrune`.

    Raises:
        UserError: a value is unknown or contradicts another one.
    """
    check_arguments(rules, settings)
    _check_kinds({"privileged": privileged}, build_game)
    if execution is not None:
        check_choice("execution", execution, Execution)
    check_whole("batch_size", batch_size, 1, MOST_IMAGES + 1)
    check_whole("repeats", repeats, 1)
    backbone = _backbone(model, weights, device, dtype)
    game_rules = build_rules(rules, backbone.depth, blocks, max_cycles, settings)
    game_rules.check(backbone)
    if not isinstance(data, ImageSource):
        data = open_source(
            None if data is None else path_text(data, "data"), backbone.model, split=split
        )
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


def _backbone(
    model: str | Backbone, weights: str | None, device: str, dtype: str | torch.dtype
) -> Backbone:
    if isinstance(model, str):
        weights = None if weights is None else path_text(weights, "weights")
        return load_backbone(model, weights, device, dtype)
    if not isinstance(model, Backbone):
        raise UserError(
            f"model={model!r:.60}: give timm's name of one, or tokenenv.Backbone(model) of yours"
        )
    if weights is not None:
        raise UserError(
            f"weights '{weights}' go with a model's name: leave them out for a backbone"
        )
    return model


def build_rules(
    rules: str | Rules,
    depth: int,
    blocks: Sequence[int] | None,
    max_cycles: int | None,
    settings: dict[str, Any],
) -> Rules:
    """Rules by name for a model of ``depth`` blocks; an instance is returned as it is.

    Raises:
        UserError: unknown name or setting, a value out of range, or settings beside an instance.
    """
    cls: Any = check_arguments(rules, settings)
    if isinstance(rules, Rules):
        given = {"blocks": blocks, "max_cycles": max_cycles, **settings}
        extra = [name for name, value in given.items() if value is not None]
        if extra:
            raise UserError(
                f"{extra[0]}={given[extra[0]]!r} goes with the name of rules: give it to "
                f"{type(rules).__name__}()"
            )
        return rules
    if max_cycles is not None:
        check_whole("max_cycles", max_cycles, 1)
    if blocks is not None:
        if isinstance(blocks, str) or not isinstance(blocks, Iterable):
            raise UserError(f"blocks={blocks!r:.60}: give a list of block indices, as (3, 6, 9)")
        blocks = tuple(blocks)
    if blocks is not None and max_cycles not in (None, len(blocks)):
        raise UserError(
            f"max_cycles={max_cycles} but {len(blocks)} decision blocks are given: "
            "leave one of the two out"
        )
    chosen = cls.decision_blocks(depth, max_cycles) if blocks is None else blocks
    # Lists come from JSON and from users; rules are hashable, so they hold tuples.
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    _check_kinds(values, cls)
    made: Rules = cls(blocks=chosen, **values)
    return made


def check_arguments(
    rules: str | Rules,
    given: Iterable[str],
    also: Sequence[str] = (),
    without: Sequence[str] = (),
) -> type[Rules]:
    """Refuse arguments that neither :func:`build_game` nor the rules take.

    Args:
        rules: name or instance.
        given: names of arguments.
        also: names that the caller takes besides.
        without: names that it does not take.

    Returns:
        The class of the rules.

    Raises:
        UserError: unknown rules; :class:`UnknownArgument` for an argument, with all that there are.
    """
    if isinstance(rules, str) and rules not in RULES:
        raise UserError(
            f"unknown rules '{rules}': choose from {', '.join(RULES)}{did_you_mean(rules, RULES)}"
        )
    if not isinstance(rules, str | Rules):
        raise UserError(
            f"rules={rules!r:.60}: give a name or an instance, such as tokenenv.TokenPrune()"
        )
    cls: Any = RULES[rules] if isinstance(rules, str) else type(rules)
    own = [name for name in inspect.signature(build_game).parameters if name != "settings"]
    settings = [field.name for field in fields(cls) if field.name != "blocks"]
    known = [name for name in (*also, *own, *settings) if name not in without]
    for name in given:
        if name not in known:
            raise UnknownArgument(
                f"unknown argument '{name}': choose from {', '.join(known)}; what a reward takes "
                f"goes into reward_kwargs={{...}}{did_you_mean(name, known)}"
            )
    found: type[Rules] = cls
    return found


def _check_kinds(values: Mapping[str, Any], annotated: Callable[..., Any]) -> None:
    """Check values against the annotations of a class or function, as a ``UserError``."""
    try:
        check_annotated(values, annotated)
    except Unfit as error:
        raise UserError(f"{error}: give it so") from None


def build_reward(
    reward: str | Reward | Callable[[Turn], Tensor] | None,
    kwargs: dict[str, Any] | None,
    rules: Rules,
    patches: int,
) -> Reward:
    """A reward by name, with the defaults for these rules and ``patches`` patches.

    A :class:`Reward` is returned as it is; a function is wrapped as one.

    Raises:
        UserError: unknown name or parameter, or parameters for a reward that is not a name.
    """
    reward = rules.default_reward if reward is None else reward
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise UserError(
            f"reward_kwargs={kwargs!r:.60}: give a dict of the reward's parameters, such as "
            "{'beta': 0.1}"
        )
    if not isinstance(reward, str):
        made = as_reward(reward)
        if kwargs:
            raise UserError(f"reward_kwargs go with a reward's name: give them to {made.name}()")
        return made
    fitting = {name: cls for name, cls in REWARDS.items() if cls.fits(rules.token_agents)}
    if reward not in fitting:
        raise UserError(
            f"unknown reward '{reward}': choose from {', '.join(fitting)}"
            f"{did_you_mean(reward, fitting)}"
        )
    cls: Any = fitting[reward]
    kwargs, decisions = kwargs or {}, len(rules.blocks)
    known = [field.name for field in fields(cls)]
    for name in kwargs:
        if name not in known:
            raise UserError(
                f"reward '{reward}' has no parameter '{name}': choose from {', '.join(known)}"
                f"{did_you_mean(str(name), known)}"
            )
    _check_kinds(kwargs, cls)
    made = cls(**(cls.defaults(decisions, patches) | kwargs))
    made.check(decisions)
    return made
