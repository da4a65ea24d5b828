"""GAE by hand, losses against the formula, dead agents, determinism, and that it learns."""

import copy
import functools

import gymnasium
import numpy as np
import pytest
import torch
from pettingzoo import ParallelEnv
from torch.testing import assert_close

from agents.learners.arena import PettingZooArena
from agents.learners.mappo import MAPPO, MAPPOConfig
from agents.learners.rollout import advantages
from agents.policies.actor import ActorPolicy, Widths
from tokenenv.errors import UserError
from tokenenv.game.rules import TokenPrune


class Identity(ParallelEnv):
    """Each agent is shown a bit and paid for repeating it.

    On request odd agents die halfway, a time limit cuts all others off, everyone is always paid.
    """

    metadata = {"name": "identity_v0"}  # noqa: RUF012

    def __init__(
        self,
        agents: int = 3,
        length: int = 4,
        deaths: bool = False,
        nan: bool = False,
        cut: bool = False,
        generous: bool = False,
    ):
        self.possible_agents = [f"a_{i}" for i in range(agents)]
        self.length, self.deaths, self.nan = length, deaths, nan
        self.cut, self.generous = cut, generous
        self.state_space = gymnasium.spaces.Box(0, 1, (agents,), np.float32)

    @functools.cache  # noqa: B019
    def observation_space(self, agent):
        return gymnasium.spaces.Box(0, 1, (2,), np.float32)

    @functools.cache  # noqa: B019
    def action_space(self, agent):
        return gymnasium.spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.agents, self.time = list(self.possible_agents), 0
        return self._see(), {a: {} for a in self.agents}

    def _see(self):
        self.bits = dict(zip(self.agents, self.rng.integers(0, 2, len(self.agents)), strict=True))
        return {a: np.eye(2, dtype=np.float32)[b] for a, b in self.bits.items()}

    def state(self):
        return np.array([self.bits.get(a, 0) for a in self.possible_agents], np.float32)

    def step(self, actions):
        acting = self.agents
        assert set(actions) == set(acting)
        reward = {a: float(self.generous or actions[a] == self.bits[a]) for a in acting}
        if self.nan:
            reward[acting[0]] = float("nan")
        self.time += 1
        over = self.time == self.length
        dead = {a: self.deaths and self.time == 2 and int(a[2:]) % 2 == 1 for a in acting}
        ended = {a: dead[a] or (over and not self.cut) for a in acting}
        cut_off = {a: over and self.cut and not dead[a] for a in acting}
        seen, infos = self._see(), {a: {} for a in acting}
        self.agents = [a for a in acting if not (ended[a] or cut_off[a])]
        return seen, reward, ended, cut_off, infos


def learner(seed: int = 0, copies: int = 8, config: MAPPOConfig | None = None, **env) -> MAPPO:
    torch.manual_seed(seed)
    arena = PettingZooArena(lambda: Identity(**env), copies, seed=seed)
    widths = Widths(arena.agent_dim, arena.shared_dim, arena.state_dim)
    policy = ActorPolicy(TokenPrune(), widths, hidden=(16, 16))
    config = config or MAPPOConfig(steps=4, actor_lr=1e-2, critic_lr=1e-2)
    return MAPPO(policy, arena, config, seed=seed)


@pytest.mark.parametrize("deaths", [False, True])
def test_the_arena_shows_what_a_time_limit_cut_off(deaths: bool) -> None:
    """The last views and state of those cut off, not those of the episode that begins."""
    arena = PettingZooArena(lambda: Identity(cut=True, deaths=deaths), 2, seed=3)
    twins = [Identity(cut=True, deaths=deaths) for _ in range(2)]
    arena.reset()
    for i, twin in enumerate(twins):
        twin.reset(seed=3 + i)
    for time in range(1, 5):
        step = arena.step(torch.zeros(2, 3, dtype=torch.long))
        seen = [twin.step(dict.fromkeys(twin.agents, 0))[0] for twin in twins]
        assert step.done.tolist() == [time == 4] * 2
        assert (step.cut is None) == (time < 4)
    expected = torch.tensor([True, not deaths, True]).expand(2, 3)
    assert torch.equal(step.cut.active, expected)
    for i, twin in enumerate(twins):
        views = [seen[i].get(name, np.zeros(2)) for name in twin.possible_agents]
        assert_close(step.cut.agents[i], torch.tensor(np.array(views)).float())
        assert_close(step.cut.state[i], torch.tensor(twin.state()))
    assert not torch.equal(step.cut.state, step.observation.state), "another episode began"


def test_without_a_state_the_cut_shows_all_that_lived() -> None:
    class Stateless(Identity):
        def __init__(self):
            super().__init__(cut=True)
            del self.state_space

    arena = PettingZooArena(Stateless, 2)
    arena.reset()
    for _ in range(4):
        step = arena.step(torch.zeros(2, 3, dtype=torch.long))
    assert torch.equal(step.cut.state, step.cut.agents.flatten(1))


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("value_norm", [False, True])
@pytest.mark.parametrize("deaths", [False, True])
def test_returns_are_in_units_of_the_reward(cut: bool, value_norm: bool, deaths: bool) -> None:
    """Critic, normaliser, time limit and deaths together, against plain loops."""
    gamma, lam = 0.9, 0.8
    config = MAPPOConfig(steps=6, gamma=gamma, lam=lam, value_norm=value_norm, actor_lr=1e-2,
                         critic_lr=1e-2)  # fmt: skip
    agent = learner(copies=3, config=config, deaths=deaths, cut=cut)
    norm = agent.value_norm
    norm.update(torch.tensor([3.0, 7.0]), torch.tensor([True, True]))  # mean 5, spread 2
    finals = []
    step = agent.arena.step

    def remember(action):
        result = step(action)
        finals.append(result)
        return result

    agent.arena.step = remember
    rollout, last, last_active = agent.collect()
    if value_norm:
        assert_close(norm.denormalise(torch.tensor(1.5)).item(), 8.0)

    def real(value: torch.Tensor) -> torch.Tensor:
        return 5 + 2 * value if value_norm else value

    active = rollout.seen["active"]
    expected = torch.zeros(6, 3, 3)
    for b in range(3):
        for a in range(3):
            for t in range(6):
                if not active[t, b, a]:
                    continue
                # lambda-return by its recursion, to the end of the rollout or of the episode
                path, k = [], t
                while True:
                    path.append(k)
                    if rollout.done[k, b] or k == 5:
                        break
                    k += 1
                over = bool(rollout.done[k, b])
                alive_after = bool(last_active[b, a]) and not over
                total = float(real(last)[b, a]) if alive_after else 0.0
                if over and cut and finals[k].cut.active[b, a]:
                    seen = {"agents": finals[k].cut.agents, "state": finals[k].cut.state}
                    with torch.no_grad():
                        total = float(real(agent.critic(seen, None)["action"])[b, a])
                for k in reversed(path):
                    mixed = total
                    if k < path[-1] and active[k + 1, b, a]:
                        value = float(real(rollout.value["action"])[k + 1, b, a])
                        mixed = (1 - lam) * value + lam * total
                    total = float(rollout.reward[k, b, a]) + gamma * mixed
                expected[t, b, a] = total
    extra = agent._credit(rollout, last, last_active)
    got = norm.denormalise(extra["returns"]) if value_norm else extra["returns"]
    assert_close(got[active], expected[active], atol=1e-4, rtol=1e-4)


def test_a_time_limit_does_not_end_the_game() -> None:
    """Paid 1 for ever at gamma 0.8, a state is worth 5; where the game ends after 4, 2.95."""
    for cut, worth in ((True, 5.0), (False, 1 + 0.8 + 0.8**2 + 0.8**3)):
        config = MAPPOConfig(steps=4, gamma=0.8, actor_lr=1e-3, critic_lr=1e-2)
        agent = learner(config=config, cut=cut, generous=True)
        for _ in range(60):
            reward = agent.update()["reward"]
        assert reward == 4, "what is logged is what was paid"
        rollout, *_ = agent.collect()
        first = agent.value_norm.denormalise(rollout.value["action"])[0]
        # Nobody is told the time: where the game ends, a state is worth the mean of 2.95 ... 1.
        mean = worth if cut else sum(sum(0.8**i for i in range(n)) for n in (1, 2, 3, 4)) / 4
        assert_close(first.mean().item(), mean, atol=0.35, rtol=0)


@pytest.mark.parametrize("value_norm", [True, False])
@pytest.mark.parametrize("advantage_norm", ["global", "per_agent"])
def test_dead_agents_give_no_gradient(value_norm: bool, advantage_norm: str) -> None:
    """Garbage in every slot of an inactive agent changes nothing, to the last bit."""
    results = []
    for garbage in (0.0, 1e6):
        agent = learner(
            deaths=True,
            config=MAPPOConfig(steps=4, value_norm=value_norm, advantage_norm=advantage_norm),
        )
        collect = agent.collect

        def dirty(collect=collect, garbage=garbage):
            rollout, last, last_active = collect()
            dead = ~rollout.seen["active"]
            assert dead.any()
            for tensor in (rollout.log_prob["action"], rollout.value["action"]):
                tensor[dead] += garbage
            rollout.seen["agents"][dead] += garbage
            return rollout, last, last_active

        agent.collect = dirty
        agent.update()
        results.append(torch.cat([p.flatten() for p in agent.policy.parameters()]))
        results.append(torch.cat([p.flatten() for p in agent.critic.parameters()]))
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


@pytest.mark.parametrize("centralised", [True, False])
@pytest.mark.parametrize("deaths", [True, False])
def test_learns_the_identity_game(centralised: bool, deaths: bool) -> None:
    config = MAPPOConfig(steps=8, actor_lr=1e-2, critic_lr=1e-2, centralised=centralised)
    agent = learner(copies=16, config=config, deaths=deaths)
    first = agent.update()["reward"]
    for _ in range(40):
        last = agent.update()["reward"]
    # 4 steps of one point each; with deaths one agent of three is paid half of the time.
    best = 4.0 if not deaths else 4.0 * (2 + 0.5) / 3
    assert first < 0.75 * best
    assert last > 0.97 * best


def test_same_seed_same_weights_and_exact_state() -> None:
    def weights(agent: MAPPO) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in agent.policy.parameters()])

    a, b, c = learner(seed=3), learner(seed=3), learner(seed=4)
    for agent in (a, b, c):
        agent.update()
    assert torch.equal(weights(a), weights(b))
    assert not torch.equal(weights(a), weights(c))


def test_a_checkpoint_goes_on_exactly() -> None:
    """Value normaliser, optimisers and generators included; the game is given the same twice."""
    a, b = learner(seed=3), learner(seed=5)
    for _ in range(2):
        a.update()
    rollout = a.collect()
    a.collect = b.collect = lambda: rollout
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    assert b.value_norm.weight > 0 and torch.equal(a.value_norm.mean, b.value_norm.mean)
    assert a.update() == b.update()
    for one, other in ((a.policy, b.policy), (a.critic, b.critic)):
        for mine, yours in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(mine, yours)
    assert torch.equal(a.generator.get_state(), b.generator.get_state())


def test_one_agent_is_plain_ppo() -> None:
    """With a single agent and no state, one descent equals PPO written out with autograd."""
    agent = learner(agents=1, config=MAPPOConfig(steps=4, epochs=1, minibatches=1, entropy=0.0,
                                                 value_norm=False, max_grad_norm=1e9))  # fmt: skip
    rollout, last, last_active = agent.collect()
    agent.collect = lambda: (rollout, last, last_active)
    advantage, _ = advantages(
        rollout.reward, rollout.value["action"], rollout.seen["active"], rollout.done,
        last, last_active, gamma=1.0, lam=0.95,
    )  # fmt: skip
    flat = advantage.flatten()
    flat = (flat - flat.mean()) / flat.std(unbiased=False)
    log_probs = agent.policy.logits(rollout.seen["agents"], rollout.seen["shared"]).log_softmax(-1)
    chosen = log_probs.gather(-1, rollout.action[..., None]).flatten()
    # At the first step the ratio is 1 and PPO's gradient is the policy gradient.
    loss = -(chosen * flat).mean()
    expected = torch.autograd.grad(loss, list(agent.policy.parameters()))
    agent.update()
    for parameter, gradient in zip(agent.policy.parameters(), expected, strict=True):
        assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)


def test_a_reward_that_is_not_finite_is_one_clear_error() -> None:
    with pytest.raises(UserError, match="not finite"):
        learner(nan=True).update()


def test_a_diverged_training_is_one_clear_error() -> None:
    agent = learner(config=MAPPOConfig(steps=4, actor_lr=1e30, critic_lr=1e30))
    with pytest.raises(UserError, match="training diverged"):
        for _ in range(3):
            agent.update()


def test_repeats_must_be_the_games() -> None:
    with pytest.raises(UserError, match="repeats=2 of the learner differs from the game's 1"):
        learner(config=MAPPOConfig(repeats=2))


def test_actions_may_start_at_another_number_than_0() -> None:
    class Shifted(Identity):
        def action_space(self, agent):
            return gymnasium.spaces.Discrete(2, start=1)

        def step(self, actions):
            return super().step({agent: action - 1 for agent, action in actions.items()})

    arena, plain = PettingZooArena(Shifted, 2, seed=3), PettingZooArena(Identity, 2, seed=3)
    arena.reset(), plain.reset()
    ones = torch.ones(2, arena.agents, dtype=torch.long)
    assert torch.equal(arena.step(ones).reward, plain.step(ones).reward)


@pytest.mark.parametrize("space", [gymnasium.spaces.MultiBinary(2), gymnasium.spaces.Box(0, 1)])
def test_other_actions_are_refused(space: gymnasium.Space) -> None:
    class Other(Identity):
        def action_space(self, agent):
            return space

    with pytest.raises(UserError, match="'a_0' needs the same Discrete action space"):
        PettingZooArena(Other, 1)


def test_spaces_must_agree() -> None:
    class Odd(Identity):
        def observation_space(self, agent):
            return gymnasium.spaces.Box(0, 1, (2 + int(agent[2:]),), np.float32)

    with pytest.raises(UserError, match="'a_1' needs the same Box"):
        PettingZooArena(Odd, 1)
