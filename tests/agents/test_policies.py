"""Heuristics keep what they say, learned policies survive the disk."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import agents
from agents.policies import POLICY, SHIPPED, load_policy
from agents.policies.actor import ActorPolicy, Widths
from agents.policies.heuristics import KeepAll, RandomPrune, TopK, keep_highest
from agents.policies.words import parse_policy
from agents.systems.registry import find_system
from agents.systems.settings import preset
from tokenenv import UserError, load_backbone, open_source
from tokenenv.game.checks import spread_blocks
from tokenenv.game.cost import Cost
from tokenenv.game.policy import Policy, play
from tokenenv.game.rewards import divergence
from tokenenv.game.rules import Observation, TokenPrune
from tokenenv.measure import evaluation
from tokenenv.storage import read_tensors, write_tensors


def observation(score: torch.Tensor, active: torch.Tensor) -> Observation:
    agents_view = score[..., None] * active[..., None]
    layout = {"cls_attention": slice(0, 1)}
    return Observation(agents_view, score[:, :0], active, 0, layout)


class Unmakeable(Policy):
    """Can be saved, and not be made of a file."""

    rules = TokenPrune()

    def act(self, observation: Observation) -> torch.Tensor:
        return observation.active.long()

    def config(self) -> dict[str, Any]:
        return {"class": "Unmakeable"}


def test_a_class_that_no_file_can_be_made_into_says_so(tmp_path: Path) -> None:
    write_tensors(tmp_path / POLICY, {}, {"class": "Unmakeable"})
    with pytest.raises(UserError, match="no class of that name is registered: import and register"):
        load_policy(tmp_path / POLICY)
    Unmakeable().save(tmp_path / POLICY)
    with pytest.raises(UserError, match="Unmakeable can't be made of a file: give it a remade"):
        load_policy(tmp_path / POLICY, trust=True)


def test_top_k_against_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(50, 20, generator=generator)
    active = torch.rand(50, 20, generator=generator) < 0.6
    got = TopK(TokenPrune(), 0.7).act(observation(score, active))
    for s, a, g in zip(score, active, got, strict=True):
        living = sorted(s[a].tolist(), reverse=True)
        wanted = living[: -(-7 * len(living) // 10)]  # ceil(0.7 n)
        assert sorted(s[g.bool()].tolist(), reverse=True) == wanted
        assert not g[~a].any()


@pytest.mark.parametrize("keep", [0.01, 0.5, 1.0])
def test_random_keeps_that_many(keep: float) -> None:
    active = torch.ones(8, 30, dtype=torch.bool)
    policy = RandomPrune(TokenPrune(), keep, seed=1)
    first = policy.act(observation(torch.zeros(8, 30), active))
    assert (first.sum(1) == max(1, round(keep * 30))).all()
    again = RandomPrune(TokenPrune(), keep, seed=1).act(observation(torch.zeros(8, 30), active))
    assert torch.equal(first, again)
    if keep == 0.5:
        assert not torch.equal(first, policy.act(observation(torch.zeros(8, 30), active)))


def test_ties_keep_the_right_number() -> None:
    active = torch.tensor([[True] * 6 + [False] * 4])
    assert keep_highest(torch.zeros(1, 10), active, 0.5).tolist() == [[1, 1, 1] + [0] * 7]


@pytest.mark.parametrize("keep", ["0", "-1", "1.01", "nan"])
def test_keep_must_be_a_share(keep: str) -> None:
    for name in ("random", "cls-attention", "norm"):
        with pytest.raises(UserError, match=r"outside \(0, 1\]"):
            parse_policy(f"{name}:keep={keep}", 12)


def test_specs_spread_blocks_over_the_depth() -> None:
    assert parse_policy("random:keep=0.5", 12).rules.blocks == (3, 6, 9)
    assert parse_policy("random:keep=0.5", 24).rules.blocks == (6, 12, 18)
    assert parse_policy("norm:keep=0.5,blocks=2/5", 12).rules.blocks == (2, 5)
    assert isinstance(parse_policy("keep-all", 12), KeepAll)


def test_a_shallow_model_has_fewer_decisions() -> None:
    assert [spread_blocks(depth) for depth in (1, 2, 3, 4)] == [(0,), (1,), (1, 2), (1, 2, 3)]


@pytest.mark.parametrize(("count", "keep", "stay"), [(50, 0.3, 15), (25, 0.6, 15), (10, 0.25, 3)])
def test_the_last_digit_of_a_ratio_keeps_no_token_more(count: int, keep: float, stay: int) -> None:
    alive = torch.ones(1, count, dtype=torch.bool)
    score = torch.rand(1, count, generator=torch.Generator().manual_seed(0))
    assert keep_highest(score, alive, keep).sum() == stay


def small_policy() -> ActorPolicy:
    torch.manual_seed(0)
    rules = TokenPrune(blocks=(1, 4), features=("norm", "cls_attention"), share=False)
    policy = ActorPolicy(rules, Widths(2, 0, 55), hidden=(8,), threshold=0.3, trained_on="x")
    policy.lean_on(slice(1, 2), 2.0)
    return policy


def test_a_policy_survives_the_disk(tmp_path: Path) -> None:
    policy = small_policy()
    policy.save(tmp_path / "policy.safetensors")
    back = agents.load(tmp_path)
    assert back.config() == policy.config()
    seen = observation(torch.randn(3, 9), torch.ones(3, 9, dtype=torch.bool))
    seen = Observation(torch.randn(3, 9, 2), seen.shared, seen.active, 0, {})
    assert torch.equal(policy.act(seen), back.act(seen))
    assert torch.equal(
        policy.logits(seen.agents, seen.shared), back.logits(seen.agents, seen.shared)
    )


def test_the_threshold_moves_the_decision() -> None:
    policy = small_policy()
    seen = Observation(torch.randn(4, 50, 2), torch.zeros(4, 0), torch.ones(4, 50).bool(), 0, {})
    keep = policy.logits(seen.agents, seen.shared).softmax(-1)[..., 1]
    for threshold in (0.2, 0.5, 0.8):
        policy.threshold = threshold
        assert torch.equal(policy.act(seen), (keep >= threshold).long())


def test_a_file_that_is_no_policy(tmp_path: Path) -> None:
    (tmp_path / "policy.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"policy\.safetensors"):
        load_policy(tmp_path / "policy.safetensors")
    with pytest.raises(UserError, match="neither a run folder"):
        agents.load(tmp_path / "nowhere")


def test_keep_all_is_the_dense_model() -> None:
    backbone = load_backbone()
    source = open_source(None, backbone.model, limit=100)
    result = evaluation.evaluate(backbone, KeepAll(TokenPrune()), source)
    report = result.report()
    assert report["agreement"] == 100.0 and report["top1"] == report["top1_dense"]
    assert report["gmacs"] == report["gmacs_dense"]
    assert report["tokens"] == [64.0] * 12


@pytest.mark.parametrize(
    ("name", "yardstick"),
    [
        ("dora-deit_tiny", "tome:r=12"),
        ("dora-strict-deit_tiny", "tome:r=11"),
        ("dora-prune-deit_tiny", "cls-attention:keep=0.815"),
    ],
)
def test_shipped_dora_does_less_damage(name: str, yardstick: str, real_data: Path) -> None:
    backbone = load_backbone(
        "deit_tiny_patch16_224", str(real_data / "weights" / "deit_tiny_patch16_224.safetensors")
    )
    source = open_source(str(real_data / "imagenet_val_300"), backbone.model, limit=48)
    batch = source.batch(torch.arange(48))
    cost = Cost(backbone)

    def saving_and_damage(what: str) -> tuple[float, float]:
        policy = parse_policy(what, backbone.depth)
        with torch.inference_mode():
            episode = play(backbone, policy, batch.images)
            macs = cost.backbone_macs(episode.attended, episode.fed)
            macs += cost.decision_macs(policy, episode.attended, episode.fed)
            damage = divergence(backbone(batch.images), episode.logits, tau=1.0)
        return 1 - macs.mean().item() / cost.dense(), damage.mean().item()

    saved, damage = saving_and_damage(name)
    saved_alike, damage_alike = saving_and_damage(yardstick)
    assert saved > saved_alike and damage < 0.8 * damage_alike


@pytest.mark.parametrize("system", ["rl4evit", "dora", "dora-prune"])
def test_a_threshold_removes_more_or_fewer_as_the_policy_says(system: str) -> None:
    """Calibration searches in the direction that ``strict`` names."""
    config = preset(find_system(system).config, None)
    torch.manual_seed(0)
    game = config.game(load_backbone(), open_source("digits", load_backbone().model, limit=64))
    policy = config.policy(game, "digits_vit").eval()
    images = open_source("digits", game.backbone.model, limit=32).batch(torch.arange(32)).images
    left = []
    for threshold in (0.02, 0.98):
        policy.threshold = threshold
        left.append(play(game.backbone, policy, images).counts[-1].sum().item())
    assert (left[1] < left[0]) == (policy.strict == 1) and left[0] != left[1]


def stored(path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> str:
    """The error of loading these."""
    write_tensors(path, tensors, config)
    with pytest.raises(UserError) as error:
        load_policy(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


SHIPPED_KINDS = ("rl4evit-deit_tiny", "dora-prune-deit_tiny")


@pytest.mark.parametrize("name", SHIPPED_KINDS)
@pytest.mark.parametrize("threshold", [math.nan, 2, -3, 0, 1, True])
def test_a_threshold_from_a_file_is_a_probability(
    name: str, threshold: float, tmp_path: Path
) -> None:
    tensors, config = read_tensors(SHIPPED / name / POLICY)
    error = stored(tmp_path / "p", tensors, config | {"threshold": threshold})
    assert "threshold" in error
    assert "finite number" in error or "is no probability" in error


@pytest.mark.parametrize("name", SHIPPED_KINDS)
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t.index_fill(0, torch.tensor([0]), torch.nan), "NaN or infinite"),
        (lambda t: t - torch.inf, "NaN or infinite"),
        (lambda t: t.double() + 1e300, "NaN or infinite"),  # not in float32
        (lambda t: t > 0, "holds bool, not float32"),
        (lambda t: t.long(), "holds int64, not float32"),
        (lambda t: t.to(torch.complex64), "holds complex64, not float32"),
    ],
    ids=["nan", "infinite", "too large", "bool", "whole", "complex"],
)
def test_a_policys_tensors_are_finite_numbers(
    name: str, spoil: Callable[[torch.Tensor], torch.Tensor], words: str, tmp_path: Path
) -> None:
    tensors, config = read_tensors(SHIPPED / name / POLICY)
    last = list(tensors)[-1]
    error = stored(tmp_path / "p", tensors | {last: spoil(tensors[last])}, config)
    assert words in error
    assert f"'{last}'" in error


def test_a_methods_settings_in_a_file_are_finite(tmp_path: Path) -> None:
    parse_policy("merge-above:similarity=0.9", 12).save(tmp_path / "p")
    tensors, config = read_tensors(tmp_path / "p")
    for where, value in (("similarity", math.nan), ("rules.least", [1, {"deep": -math.inf}])):
        spoilt = copy.deepcopy(config)
        (spoilt if where == "similarity" else spoilt["rules"])[where.split(".")[-1]] = value
        assert "is no finite number" in stored(tmp_path / "p", tensors, spoilt)
