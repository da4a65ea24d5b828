"""Record episodes of a policy as a data set for offline reinforcement learning."""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
from torch import nn

from tokenenv._version import __version__
from tokenenv.api.opening import open_candidates
from tokenenv.data import Preprocessing
from tokenenv.data.splits import Split
from tokenenv.envs.ids import IDS, vector_class
from tokenenv.errors import UserError, check_keywords
from tokenenv.game.checks import check_whole
from tokenenv.game.episode import Episode
from tokenenv.game.policy import Policy
from tokenenv.game.rules import RULES
from tokenenv.measure.candidate import MethodCandidate
from tokenenv.measure.opening import named_model, text
from tokenenv.suite.opened import BEFORE_ATTENTION


@dataclass(frozen=True)
class Dataset:
    """A data set that was written.

    Attributes:
        name: its name in Minari.
        what: the policy, as it was named.
        environment: the registered id of the game.
        episodes, steps: how many.
        mean_return: mean sum of an episode's rewards.
        correct: share of the images that were classified correctly.
        folder: where it lies.
    """

    name: str
    what: str
    environment: str
    episodes: int
    steps: int
    mean_return: float
    correct: float
    folder: Path


@check_keywords
def record(
    what: Any,
    *,
    minari: str,
    episodes: int = 100,
    seed: int = 0,
    split: Split = "train",
    model: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    trust: bool = False,
) -> Dataset:
    """Write a policy's episodes to a Minari data set; as ``tokenenv record``.

    The episodes are those of the Gymnasium environment, with its default reward. A policy with
    weights is recorded with the observations that it reads itself, any other with those that the
    environment gives by default. Every episode keeps the seed of its ``reset``, and the data set
    the environment's arguments, so that ``dataset.recover_environment()`` can play it again.

    Args:
        what: a policy as for :func:`tokenenv.evaluate`, one that acts in a game.
        minari: the data set's name, such as ``tokenenv/digits-tome-v0``.
        episodes: number of episodes, one image each.
        seed: of the first episode; the next ones have the next seeds.
        split: which part of the images, if they have parts.
        model: timm's name of the model; None: the one ``what`` was trained on, else ``digits_vit``.
        weights: a ``.safetensors`` or ``.pth`` state dict; None: the embedded weights or timm's.
        data: a folder of class/image, or a torchvision data set such as ``"CIFAR10:ROOT"``; None:
            those that belong to an embedded model.
        device: ``"cpu"``, ``"cuda"`` ...
        trust: whether to run third-party code that a saved policy names.

    Raises:
        UserError: Minari is not installed, the name is taken or is none, an argument is wrong, or
            ``what`` acts in none of the registered games.
    """
    check_whole("episodes", episodes, 1)
    check_whole("seed", seed, 0)
    library = _import_minari()
    _check_name(library, minari)
    named = named_model(model, weights, device, "float32", None)
    opened = open_candidates([what], named, data=text(data, "data"), trust=trust)
    (candidate,) = opened.candidates
    policy, environment = _playable(candidate, opened.dense)
    if opened.model.preprocessing != Preprocessing():
        raise UserError(
            f"'{candidate.what}' has preprocessing of its own, which the environments don't take: "
            "record a policy on the model's own"
        )
    settings = {
        "model": opened.model.name,
        "weights": opened.model.weights,
        "data": text(data, "data"),
        "split": split,
        "device": device,
        **_settings(policy),
    }
    given = {name: value for name, value in settings.items() if value is not None}
    env = gymnasium.make(environment, **given)
    buffers = [_episode(library, env, policy, seed + i, i) for i in range(episodes)]
    stored = _store(library, minari, buffers, env, candidate.what)
    return Dataset(
        name=minari,
        what=candidate.what,
        environment=environment,
        episodes=episodes,
        steps=sum(len(buffer.rewards) for buffer in buffers),
        mean_return=float(np.mean([sum(buffer.rewards) for buffer in buffers])),
        correct=float(np.mean([buffer.infos["correct"][-1] for buffer in buffers])),
        folder=Path(stored.storage.data_path).parent,
    )


def _import_minari() -> ModuleType:
    try:
        import h5py  # noqa: F401  (the format that Minari writes by default)
        import minari
    except ImportError:
        raise UserError("Minari is not installed: pip install 'tokenenv[minari]'") from None
    return minari


def _check_name(library: ModuleType, name: str) -> None:
    from minari.dataset.minari_dataset import parse_dataset_id

    try:
        parse_dataset_id(name)
    except (TypeError, ValueError):
        raise UserError(
            f"minari={name!r:.80} is no name of a data set: give one such as "
            "tokenenv/digits-tome-v0"
        ) from None
    if name in library.list_local_datasets():
        raise UserError(
            f"the data set '{name}' exists: give another version, or remove it by "
            f"'minari delete {name}'"
        )


def _playable(candidate: Any, dense: Any) -> tuple[Policy, str]:
    """The policy and the registered id of the game that it acts in."""
    method = candidate.method if isinstance(candidate, MethodCandidate) else None
    if not isinstance(method, Policy):
        raise UserError(
            f"'{candidate.what}' acts in no game, so there are no actions to record: take a "
            "policy such as tome:r=8, random:keep=0.7 or a run"
        )
    name = next((name for name, cls in RULES.items() if type(method.rules) is cls), None)
    known = (entry.id for entry in IDS if vector_class(entry.id).rules == name)
    environment = next(known, None)
    if environment is None:
        raise UserError(
            f"'{candidate.what}' plays {type(method.rules).__name__}, which no registered "
            "environment has: 'tokenenv envs' lists them"
        )
    if candidate.backbone is not dense:
        raise UserError(
            f"'{candidate.what}' has fine-tuned the model, and the environments take no such "
            "weights: record a policy on a frozen model"
        )
    return copy.deepcopy(method), environment


def _settings(policy: Policy) -> dict[str, Any]:
    """The arguments that give an environment the policy's game."""
    rules = policy.rules
    assert is_dataclass(rules)
    kept = {field.name: getattr(rules, field.name) for field in fields(rules)}
    if isinstance(policy, nn.Module):
        return kept
    kept = {name: value for name, value in kept.items() if name not in ("features", "share")}
    if not rules.between and rules.blocks[0] == 0:
        kept["features"] = BEFORE_ATTENTION
    return kept


def _episode(library: ModuleType, env: Any, policy: Policy, seed: int, number: int) -> Any:
    """One episode as Minari's buffer; the policy observes it by its own rules."""
    observation, info = env.reset(seed=seed)
    game = env.unwrapped.game
    own = Episode(game.backbone, policy.rules, game.images, execution=game.execution)
    seen, infos, actions, steps = [observation], [info], [], []
    while not own.done:
        chosen = policy.next_action(own)
        by_agent = policy.rules.to_roster(game.backbone, own.tokens, chosen)[0].long().cpu().numpy()
        own.act(chosen)
        action = int(by_agent[0]) if game.rules.by_count else by_agent
        observation, reward, over, _, info = env.step(action)
        seen.append(observation)
        infos.append(info)
        actions.append(action)
        steps.append((reward, over))
    # With lists that grow step by step Minari needs JAX; with whole ones it does not.
    return library.data_collector.EpisodeBuffer(
        id=number,
        seed=seed,
        observations=np.stack(seen),
        actions=np.stack(actions),
        rewards=[reward for reward, _ in steps],
        terminations=[over for _, over in steps],
        truncations=[False] * len(steps),
        infos={key: np.stack([each[key] for each in infos]) for key in info},
    )


def _store(library: ModuleType, name: str, buffers: list[Any], env: Any, what: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about authors and links, left out
            return library.create_dataset_from_buffers(
                name,
                buffers,
                env=env,
                algorithm_name=what,
                description=f"Episodes of {what} in {env.spec.id}, with its default reward.",
                requirements=[f"tokenenv=={__version__}"],
            )
    except BaseException:  # also an interrupt: half a data set would look like a whole one
        with contextlib.suppress(Exception):
            library.delete_dataset(name)
        raise
