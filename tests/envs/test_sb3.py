"""stable-baselines3: the vectorised form of the games, and what was learned on it as a policy."""

from __future__ import annotations

import builtins
import importlib
import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import PATCHES, same, small

from tokenenv import UserError
from tokenenv.game.policy import play

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

MERGE, PRUNE, TOKENS = "tokenenv/LayerMerge-v0", "tokenenv/LayerPrune-v0", "tokenenv/TokenPrune-v0"


@pytest.mark.parametrize("name", [TOKENS, MERGE, PRUNE])
def test_stable_baselines_vec_env_learns(name: str) -> None:
    sb3, contrib = pytest.importorskip("stable_baselines3"), pytest.importorskip("sb3_contrib")
    from tokenenv.envs.sb3 import SB3VecEnv

    envs = SB3VecEnv(name, 4, **small(max_cycles=2))
    settings: dict[str, Any] = {"n_steps": 4, "batch_size": 16, "n_epochs": 1, "device": "cpu"}
    model = sb3.PPO("MlpPolicy", envs, seed=0, **settings).learn(32)
    assert len(model.ep_info_buffer) == 16 and model.ep_info_buffer[0]["l"] == 2
    maskable = contrib.MaskablePPO("MlpPolicy", envs, **settings).learn(32)
    seen = envs.reset()
    for _ in range(2):
        masks = np.stack(envs.env_method("action_masks"))
        choice, _ = maskable.predict(seen, action_masks=masks)
        seen, _, ends, infos = envs.step(choice)
    assert ends.all() and all(info["illegal_actions"] == 0 for info in infos)


@pytest.mark.parametrize("name", [MERGE, PRUNE])
@pytest.mark.parametrize("algorithm", ["PPO", "MaskablePPO"])
def test_what_stable_baselines_trained_is_evaluated_as_it_plays(name: str, algorithm: str) -> None:
    sb3, contrib = pytest.importorskip("stable_baselines3"), pytest.importorskip("sb3_contrib")
    from agents.policies.sb3 import SB3Policy
    from tokenenv.envs.sb3 import SB3VecEnv

    envs = SB3VecEnv(name, 32, max_cycles=4)
    game = envs.envs.game
    settings: dict[str, Any] = {"n_steps": 4, "batch_size": 64, "n_epochs": 1, "device": "cpu"}
    make_learner = sb3.PPO if algorithm == "PPO" else contrib.MaskablePPO
    learner = make_learner("MlpPolicy", envs, seed=0, policy_kwargs={"net_arch": [16]}, **settings)
    learner.learn(128)
    with torch.no_grad():  # prefer other counts at every decision, among them illegal ones
        learner.policy.action_net.weight.normal_(0, 3)
    envs.seed(3)
    seen = envs.reset()
    images = game.images
    for _ in range(4):
        masks = np.stack(envs.env_method("action_masks"))
        given = {"action_masks": masks} if algorithm == "MaskablePPO" else {}
        seen, _, _, infos = envs.step(learner.predict(seen, deterministic=True, **given)[0])
    policy = SB3Policy(learner, game)
    episode = play(game.backbone, policy, images)
    left = episode.counts[-1].tolist()
    assert left == [info["tokens_left"] for info in infos]
    assert len(set(left)) > 1 or name == PRUNE
    widths = envs.observation_space.shape[0] * 16 + 16 * game.actions
    assert policy.macs(torch.ones(2), torch.zeros(2)).tolist() == [widths] * 2


def test_learners_of_another_game_are_refused() -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    from agents.policies.sb3 import SB3Policy
    from tokenenv.envs.sb3 import SB3VecEnv

    envs = {name: SB3VecEnv(name, 2, **small(max_cycles=2)) for name in (TOKENS, MERGE, PRUNE)}
    learner = sb3.PPO("MlpPolicy", envs[MERGE], device="cpu")
    with pytest.raises(UserError, match="asks every token and not for a count"):
        SB3Policy(learner, envs[TOKENS].envs.game)
    scaled = sb3.common.vec_env.VecNormalize(envs[MERGE])
    with pytest.raises(UserError, match="observations that VecNormalize scaled"):
        SB3Policy(sb3.PPO("MlpPolicy", scaled, device="cpu"), envs[MERGE].envs.game)
    with pytest.raises(UserError, match=r"learner observes Box.* the game that it was trained"):
        SB3Policy(learner, SB3VecEnv(MERGE, 2, **small(max_cycles=3)).envs.game)
    with pytest.raises(UserError, match=r"chooses from Discrete\(.*the game takes Discrete"):
        pruner = sb3.PPO("MlpPolicy", envs[PRUNE], device="cpu")
        SB3Policy(pruner, SB3VecEnv(PRUNE, 2, budget_step=4, **small(max_cycles=2)).envs.game)
    with pytest.raises(UserError, match=r"trained with LayerMerge\(.*the game has LayerMerge\("):
        SB3Policy(learner, SB3VecEnv(MERGE, 2, **small(blocks=(0, 2))).envs.game)
    with pytest.raises(UserError, match=r"trained with LayerMerge\("):
        alone = sb3.PPO("MlpPolicy", gym.make(MERGE, **small(max_cycles=2)), device="cpu")
        SB3Policy(alone, SB3VecEnv(MERGE, 2, **small(blocks=(0, 2))).envs.game)
    rewards_alone = sb3.common.vec_env.VecNormalize(envs[MERGE], norm_obs=False)
    SB3Policy(sb3.PPO("MlpPolicy", rewards_alone, device="cpu"), envs[MERGE].envs.game)
    env = gym.make(MERGE, **small(max_cycles=2))
    critic_only = sb3.DQN("MlpPolicy", env, buffer_size=10, device="cpu")
    made = SB3Policy(critic_only, gym.make(MERGE, **small(max_cycles=2)).unwrapped.game)
    # The network of action values, of which DQN has two hidden layers of 64.
    layers = env.observation_space.shape[0] * 64 + 64 * 64 + 64 * int(env.action_space.n)
    assert made.macs(torch.ones(1), torch.zeros(1)).item() == layers


def test_learners_of_other_algorithms() -> None:
    contrib = pytest.importorskip("sb3_contrib")
    from agents.policies.sb3 import SB3Policy
    from tokenenv.envs.sb3 import SB3VecEnv

    envs = SB3VecEnv(MERGE, 2, **small(max_cycles=2))
    remembers = contrib.RecurrentPPO("MlpLstmPolicy", envs, n_steps=2, batch_size=4, device="cpu")
    with pytest.raises(UserError, match=r"RecurrentActorCriticPolicy is not known.*no memory"):
        SB3Policy(remembers, envs.envs.game)

    class Own(contrib.MaskablePPO):
        """Somebody's variant."""

    learner = Own("MlpPolicy", envs, n_steps=2, batch_size=4, device="cpu")
    with torch.no_grad():  # many pairs at every decision, more than there are at the second
        learner.policy.action_net.weight.zero_()
        learner.policy.action_net.bias.copy_(torch.arange(float(envs.action_space.n)))
    game = envs.envs.game
    envs.reset()
    counts = play(game.backbone, SB3Policy(learner, game), game.images).counts
    assert (counts[-1] < counts[-2]).all(), "without its mask an illegal count is played as 0"


def test_stable_baselines_vec_env_is_the_vector_env() -> None:
    pytest.importorskip("stable_baselines3")
    from tokenenv.envs.sb3 import SB3VecEnv

    envs = SB3VecEnv(MERGE, 3, render_mode="rgb_array", **small(max_cycles=2))
    ours = gym.make_vec(MERGE, 3, vectorization_mode="vector_entry_point", **small(max_cycles=2))
    assert envs.observation_space == ours.single_observation_space
    assert envs.action_space == ours.single_action_space
    envs.seed(5)
    assert same(envs.reset(), ours.reset(seed=5)[0])
    assert [info["tokens_left"] for info in envs.reset_infos] == [PATCHES] * 3
    for _ in range(2):
        seen, rewards, ends, infos = envs.step(np.array([0, 1, 2]))
        other = ours.step(np.array([0, 1, 2]))
        assert same((seen, rewards, ends), other[:3])
    assert not any(info["terminal_observation"].any() for info in infos)
    assert not any(info["TimeLimit.truncated"] for info in infos)
    assert [info["tokens_left"] for info in infos] == [64, 60, 56]
    assert infos[1]["episode"]["r"] == pytest.approx(other[4]["final_info"]["episode"]["r"][1])
    assert envs.render().ndim == 3 and len(envs.get_images()) == 3
    assert envs.get_attr("max_cycles", [0, 2]) == [2, 2]
    assert not envs.has_attr("nothing") and envs.env_is_wrapped(gym.Wrapper) == [False] * 3
    with pytest.raises(UserError, match="method 'step'"):
        envs.env_method("step", 0)
    with pytest.raises(UserError, match="unknown id 'CartPole-v1': choose from tokenenv/"):
        SB3VecEnv("CartPole-v1")


def test_without_stable_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("stable_baselines3"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "tokenenv.envs.sb3", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"not installed: pip install 'tokenenv\[sb3\]'"):
        importlib.import_module("tokenenv.envs.sb3")
