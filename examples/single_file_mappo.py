"""MAPPO on the token game in one file, which imports only the environment from this project.

    python examples/single_file_mappo.py --updates 60 --seed 0

Each of an image's 64 tokens has an agent that keeps or prunes it before three blocks of a small
Vision Transformer. All agents get the same reward: the fidelity of the prediction minus a price for
kept tokens. The policy is shared and reads an agent's own observation; the critic reads the mean
over the agents of the image (Yu et al. 2022, "The Surprising Effectiveness of PPO in Cooperative
Multi-Agent Games"). Copy it and change it.
"""

from __future__ import annotations

import argparse
import time

import gymnasium as gym
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

import tokenenv  # noqa: F401  (registers the environments)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--updates", type=int, default=60, help="rollouts, each followed by some epochs")
    add("--seed", type=int, default=0)
    add("--num-envs", type=int, default=64, help="images in a batch")
    add("--episodes", type=int, default=4, help="episodes of each image slot in a rollout")
    add("--epochs", type=int, default=4)
    add("--minibatches", type=int, default=4)
    add("--lr", type=float, default=2e-3)
    add("--gamma", type=float, default=1.0, help="1: an episode has but three steps")
    add("--gae-lambda", type=float, default=0.95)
    add("--clip", type=float, default=0.2)
    add("--entropy", type=float, default=0.001)
    add("--max-grad-norm", type=float, default=0.5)
    add("--price", type=float, default=0.2, help="of a decision that all tokens stay")
    return parser.parse_args()


def make(args: argparse.Namespace, split: str, num_envs: int) -> gym.vector.VectorEnv:
    """The environment with a batch of images from part ``split`` of the digits, on tensors."""
    return gym.make_vec(
        "tokenenv/TokenPrune-v0",
        num_envs=num_envs,
        output="torch",
        split=split,
        reward="cooperative",
        reward_kwargs={"beta": args.price, "shared": True},
    )


def linear(inputs: int, outputs: int, gain: float = 2**0.5) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def perceptron(inputs: int, outputs: int, gain: float) -> nn.Sequential:
    return nn.Sequential(
        linear(inputs, 64), nn.LayerNorm(64), nn.ReLU(),
        linear(64, 64), nn.LayerNorm(64), nn.ReLU(),
        linear(64, outputs, gain),
    )  # fmt: skip


class Agents(nn.Module):
    """One actor for all agents, and a critic for the image; inputs ``view (..., A, F)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.actor = perceptron(width, 2, gain=0.01)
        self.critic = perceptron(width + 1, 1, gain=1.0)

    def policy(self, view: Tensor, active: Tensor) -> Categorical:
        """Action distributions of ``(..., A)`` agents; inactive agents always choose 0."""
        forbidden = torch.stack([torch.zeros_like(active), ~active], dim=-1)
        return Categorical(logits=self.actor(view).masked_fill(forbidden, -1e9))

    def value(self, view: Tensor, active: Tensor) -> Tensor:
        """``(...)`` value of the team, from the mean view of active agents and their number."""
        weight = active[..., None].float()
        mean = (view * weight).sum(-2) / weight.sum(-2).clamp(min=1)
        return self.critic(torch.cat([mean, weight.mean(-2)], dim=-1))[..., 0]


@torch.no_grad()
def evaluate(agents: Agents, args: argparse.Namespace) -> str:
    """Return, accuracy and tokens on held-out images; actions are sampled."""
    envs = make(args, "test", 300)
    view, info = envs.reset(seed=0)
    returns, right, left = [], [], []
    while len(returns) < 2:
        action = agents.policy(view, info["active_mask"]).sample()
        view, _, ended, _, info = envs.step(action)
        if ended.all():
            final = info["final_info"]
            returns.append(final["episode"]["r"].mean() / action.shape[1])
            right.append(final["correct"].float().mean())
            left.append(final["tokens_left"].float().mean() / action.shape[1])
    means = [torch.stack(values).mean().item() for values in (returns, right, left)]
    return f"return {means[0]:.3f}, accuracy {means[1]:.1%}, tokens left {means[2]:.1%}"


def advantages(
    reward: Tensor, value: Tensor, done: Tensor, gamma: float, gae_lambda: float
) -> Tensor:
    """Generalised advantages ``(T, B)``; the last row of a rollout ends an episode."""
    found = torch.zeros_like(reward)
    last = torch.zeros_like(reward[0])
    after = torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        going = (~done[t]).float()
        delta = reward[t] + gamma * going * after - value[t]
        last = delta + gamma * gae_lambda * going * last
        found[t], after = last, value[t]
    return found


def ppo_loss(
    agents: Agents,
    args: argparse.Namespace,
    view: Tensor,
    active: Tensor,
    action: Tensor,
    old: Tensor,
    gain: Tensor,
    target: Tensor,
) -> Tensor:
    """Clipped surrogate, entropy bonus and value loss of ``B`` decisions of ``A`` agents each.

    ``view`` is ``(B, A, F)``; ``active``, ``action`` and ``old`` (the log-probability of the action
    when it was taken) are ``(B, A)``; ``gain`` (the advantage) and ``target`` (the return) are
    ``(B,)``.
    """
    choice = agents.policy(view, active)
    ratio = (choice.log_prob(action) - old).exp()
    gain = gain[:, None]
    surrogate = torch.min(ratio * gain, ratio.clamp(1 - args.clip, 1 + args.clip) * gain)
    # Inactive agents are masked out.
    weight = active / active.sum()
    return (
        -(surrogate * weight).sum()
        - args.entropy * (choice.entropy() * weight).sum()
        + 0.5 * (agents.value(view, active) - target).square().mean()
    )


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    envs = make(args, "train", args.num_envs)
    count, width = envs.single_observation_space.shape
    agents = Agents(width)
    optimiser = torch.optim.Adam(agents.parameters(), lr=args.lr, eps=1e-5)
    steps = args.episodes * envs.max_cycles
    print(f"MAPPO: {count} agents on each of {args.num_envs} images, {steps} steps per update")
    print(f"held-out images before: {evaluate(agents, args)}")

    began = time.perf_counter()
    view, info = envs.reset(seed=args.seed)
    first = 0.0
    for update in range(1, args.updates + 1):
        rows: list[tuple[Tensor, ...]] = []
        returns = []
        for _ in range(steps):
            active = info["active_mask"]
            with torch.no_grad():
                choice = agents.policy(view, active)
                action = choice.sample()
                value = agents.value(view, active)
            then, reward, done, _, info = envs.step(action)
            # The environment returns the sum over the agents; the team reward is the mean.
            row = view, active, action, choice.log_prob(action), value, reward / count, done
            rows.append(row)
            if done.all():
                returns.append(info["final_info"]["episode"]["r"].mean().item() / count)
            view = then
        views, actives, actions, old, values, rewards, dones = map(
            torch.stack, zip(*rows, strict=True)
        )
        gains = advantages(rewards, values, dones, args.gamma, args.gae_lambda)
        targets = gains + values
        gains = (gains - gains.mean()) / (gains.std() + 1e-8)

        flat = [x.flatten(0, 1) for x in (views, actives, actions, old, gains, targets)]
        for _ in range(args.epochs):
            for index in torch.randperm(len(flat[0])).chunk(args.minibatches):
                loss = ppo_loss(agents, args, *(x[index] for x in flat))
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agents.parameters(), args.max_grad_norm)
                optimiser.step()
        if update % max(1, args.updates // 15) == 0 or update == 1:
            mean = sum(returns) / len(returns)
            first = mean if update == 1 else first
            speed = update * steps * args.num_envs * count / (time.perf_counter() - began)
            bar = "#" * round(40 * max(0.0, (mean - first) / (1 - first)))
            print(f"update {update:4d}  return {mean:.3f}  {speed:9,.0f} agent-steps/s  {bar}")
    print(f"held-out images after:  {evaluate(agents, args)}")


if __name__ == "__main__":
    main()
