"""TorchRL's own MAPPO on the token game, with tensors throughout.

    pip install 'tokenenv[torchrl]' 'torchrl>=0.14'
    python examples/torchrl_mappo.py --updates 40 --seed 0

The environment is a TorchRL ``EnvBase`` with a batch of images; the loss, the advantages and the
networks are TorchRL's. All agents of an image get the same reward; the critic reads its state.
"""

from __future__ import annotations

import argparse

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.envs import ExplorationType, set_exploration_type
from torchrl.modules import MLP, MaskedCategorical, MultiAgentMLP, ProbabilisticActor
from torchrl.objectives.multiagent import MAPPOLoss

from tokenenv.envs.torchrl import TorchRLEnv

ID = "tokenenv/TokenPrune-v0"
REWARD = {"reward": "cooperative", "reward_kwargs": {"beta": 0.2, "shared": True}}


class Critic(nn.Module):
    """A value for each agent, from the image's state; all the same, as their rewards are."""

    def __init__(self, env: TorchRLEnv) -> None:
        super().__init__()
        self.agents = env.game.agents
        self.value = MLP(env.game.state_dim, 1, depth=2, num_cells=64)

    def forward(self, state: Tensor) -> Tensor:
        """``(..., S)`` -> ``(..., A, 1)``."""
        value = self.value(state)[..., None, :]
        return value.expand(*value.shape[:-2], self.agents, 1)


def networks(env: TorchRLEnv) -> tuple[ProbabilisticActor, TensorDictModule]:
    shape = env.observation_spec["agents", "observation"].shape
    views = MultiAgentMLP(
        shape[-1], env.game.actions, shape[-2], centralized=False, share_params=True,
        depth=2, num_cells=64,
    )  # fmt: skip
    actor = ProbabilisticActor(
        TensorDictModule(views, [("agents", "observation")], [("agents", "logits")]),
        spec=env.full_action_spec_unbatched,
        in_keys={"logits": ("agents", "logits"), "mask": ("agents", "action_mask")},
        out_keys=[("agents", "action")],
        distribution_class=MaskedCategorical,
        return_log_prob=True,
        log_prob_key=("agents", "log_prob"),
        # Sampled in the evaluation too: "the mode of each agent" is another policy.
        default_interaction_type=ExplorationType.RANDOM,
    )
    return actor, TensorDictModule(Critic(env), ["state"], [("agents", "state_value")])


def play(env: TorchRLEnv, actor: ProbabilisticActor, episodes: int) -> TensorDict:
    """``(B, T)`` transitions, continuing from where the last call stopped."""
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        return env.rollout(episodes * env.game.steps, actor, break_when_any_done=False)


def mean_return(data: TensorDict) -> float:
    """Mean return of an agent per episode."""
    episodes = data["next", "done"].sum()
    return (data["next", "agents", "reward"].mean(-2).sum() / episodes).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-envs", type=int, default=64, help="images in a batch")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    env = TorchRLEnv(ID, args.num_envs, device=args.device, **REWARD)
    test = TorchRLEnv(ID, 300, model=env.game.backbone, split="test", **REWARD)
    env.set_seed(args.seed)
    test.set_seed(args.seed)
    actor, critic = (module.to(env.device) for module in networks(env))
    loss = MAPPOLoss(actor, critic, entropy_coeff=0.001)
    loss.set_keys(
        action=("agents", "action"),
        sample_log_prob=("agents", "log_prob"),
        value=("agents", "state_value"),
        **{name: ("agents", name) for name in ("reward", "done", "terminated")},
    )
    loss.make_value_estimator(gamma=1.0, lmbda=0.95)
    optimiser = torch.optim.Adam(loss.parameters(), lr=2e-3, eps=1e-5)

    print(f"TorchRL MAPPO: {env.game.agents} agents on each of {args.num_envs} images")
    print(f"held-out images before: mean return {mean_return(play(test, actor, 2)):.3f}")
    for update in range(1, args.updates + 1):
        data = play(env, actor, episodes=4)
        with torch.no_grad():
            loss.value_estimator(data)
        flat = data.reshape(-1)
        for _ in range(4):
            for index in torch.randperm(len(flat), device=env.device).chunk(4):
                terms = loss(flat[index])
                total = terms["loss_objective"] + terms["loss_critic"] + terms["loss_entropy"]
                optimiser.zero_grad()
                total.backward()
                nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                optimiser.step()
        if update % max(1, args.updates // 10) == 0:
            left = data["next", "info", "tokens_left"][data["next", "done"]].float().mean()
            print(f"update {update:4d}  mean return {mean_return(data):.3f}  tokens {left:.1f}")
    print(f"held-out images after:  mean return {mean_return(play(test, actor, 2)):.3f}")


if __name__ == "__main__":
    main()
