"""BenchMARL's learners in the suite, where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from suite_tasks import TINY, elsewhere, run  # noqa: F401

from tokenenv.errors import UserError
from tokenenv.suite.opened import open_task
from tokenenv.suite.results import read_result
from tokenenv.suite.stages import Stages

pytest.importorskip("benchmarl")


@pytest.fixture(autouse=True)
def short_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds chosen on few images: what they are does not matter here."""
    monkeypatch.setattr("tokenenv.suite.opened._SAMPLE", 16)


@pytest.mark.parametrize("algorithm", ["mappo", "ippo", "qmix", "vdn"])
def test_a_learner_keeps_the_budget_and_has_a_curve(algorithm: str) -> None:
    command = f"run tiny-prune-v0 --learner benchmarl:{algorithm} --seeds 0 --evaluate-every 128"
    assert run(command) == 0
    (path,) = Path("suite/results/tiny-prune-v0").iterdir()
    result = read_result(path)
    assert [stage.episodes for stage in result.curve] == [0, 128]
    assert len(result.points) > 2 and result.made["versions"]["benchmarl"]
    assert result.made["settings"]["experiment"]["max_n_iters"] * 128 == TINY.budget
    assert run(f"validate {path}") == 0


def test_the_policy_is_the_actor_that_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    from tensordict import TensorDict

    from tokenenv.suite import benchmarl

    experiments: list[Any] = []

    class Watched(benchmarl.Experiment):
        def run(self) -> None:
            experiments.append(self)
            super().run()

    monkeypatch.setattr(benchmarl, "Experiment", Watched)
    opened = open_task(TINY)
    opened.stages = Stages(128)
    policy: Any = benchmarl.learn("ippo", opened, 0, Path("run"), "float32")
    assert opened.played == TINY.budget
    actor = experiments[0].algorithm.get_policy_for_loss("agents")
    seen = torch.randn(3, TINY.agents, policy.call[0].in_features)
    mask = torch.ones(3, TINY.agents, 2, dtype=torch.bool)
    group = TensorDict({"observation": seen, "action_mask": mask}, (3, TINY.agents))
    with torch.no_grad():
        logits = actor(TensorDict({"agents": group}, (3,)))["agents", "logits"]
    assert torch.allclose(policy.call(seen), logits, atol=1e-6)
    start = opened.stages.kept[0]["policy"]
    assert not torch.equal(start.call[0].weight, policy.call[0].weight)


def test_the_torchrl_environment_counts_the_budget() -> None:
    opened = open_task(TINY)
    env = opened.torchrl_env(64)
    for _ in range(5):
        env.rollout(3)
    assert opened.played == 256
    with pytest.raises(UserError, match="plays 320 episodes"):
        env.reset()
    with pytest.raises(UserError, match="has its own model: leave it out"):
        opened.torchrl_env(8, model="digits_vit")
