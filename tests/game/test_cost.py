"""Multiply-adds: known totals, and the closed form against what is really executed."""

import copy

import pytest
import timm
import torch
from helpers import executed_macs
from torch.testing import assert_close

from agents.policies.actor import ActorPolicy, Widths
from agents.policies.gated import GatedPolicy
from agents.policies.heuristics import MergeStrongest, TopK
from agents.policies.words import parse_policy
from tokenenv.game.cost import Cost, measured_macs
from tokenenv.game.episode import Episode
from tokenenv.game.policy import Method, play
from tokenenv.game.rules import LayerMerge, LayerPrune, TokenPrune
from tokenenv.vit.backbone import Backbone


@pytest.mark.parametrize(
    ("name", "gmacs"),
    [
        ("deit_tiny_patch16_224", 1.2537),
        ("deit_small_patch16_224", 4.5989),
        ("deit_base_patch16_224", 17.5638),
        ("vit_large_patch16_224", 61.5547),
    ],
)
def test_the_known_totals(name: str, gmacs: float) -> None:
    with torch.device("meta"):
        backbone = Backbone(timm.create_model(name))
    assert round(Cost(backbone).dense() / 1e9, 4) == gmacs


@pytest.fixture(scope="module", params=["deit_tiny_patch16_224", "vit_medium_patch16_gap_256",
                                        "vit_base_patch16_siglip_224",
                                        "deit_tiny_distilled_patch16_224"])  # fmt: skip
def backbone(request: pytest.FixtureRequest) -> Backbone:
    torch.manual_seed(0)
    options = {"embed_dim": 96, "depth": 6, "num_heads": 3, "num_classes": 11, "img_size": 96}
    return Backbone(timm.create_model(request.param, **options))


def learned(backbone: Backbone) -> ActorPolicy:
    features: tuple[str, ...] = ("token", "position", "progress", "similarity", "norm")
    if backbone.has_class_token:
        features += ("cls_attention", "redundancy")
    rules = TokenPrune(blocks=(1, 3, 5), features=features)
    widths = Widths(
        rules.agent_dim(backbone), rules.shared_dim(backbone), rules.state_dim(backbone)
    )
    policy = ActorPolicy(rules, widths, hidden=(16, 8))
    # What it keeps depends on the image.
    policy.lean_on(rules.layout(backbone)["norm"], 5.0)
    return policy


def test_closed_form_agrees_with_torchs_counter(backbone: Backbone) -> None:
    """Batch of one, padded: every token that runs is a living one, so the two must be equal."""
    policy, cost = learned(backbone), Cost(backbone)
    images = torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    totals = []
    for image in images:
        one = image[None]
        with torch.no_grad():
            episode = play(backbone, policy, one, "padded")
        counted = executed_macs(lambda one=one: play(backbone, policy, one, "padded"))
        lengths = episode.attended, episode.fed
        closed = cost.backbone_macs(*lengths) + cost.decision_macs(policy, *lengths)
        assert closed.item() == pytest.approx(counted, rel=1e-9)
        totals.append(counted)
    assert len(set(totals)) > 1, "the policy should treat the images differently"
    assert cost.dense() == pytest.approx(measured_macs(lambda: backbone(images[:1])), rel=1e-9)


def test_the_cost_of_a_batch_is_that_of_its_images(backbone: Backbone) -> None:
    policy, cost = learned(backbone), Cost(backbone)
    images = torch.randn(4, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        episodes = [play(backbone, policy, images, "masked")]
        episodes += [play(backbone, policy, i[None], "padded") for i in images]
    whole, *single = (cost.backbone_macs(e.attended, e.fed) for e in episodes)
    assert whole.tolist() == [float(s) for s in single]


def test_the_policy_is_in_the_bill() -> None:
    backbone = Backbone(timm.create_model("deit_tiny_patch16_224", depth=4))
    rules = TokenPrune(blocks=(1, 2), features=("token", "position", "cls_attention"))
    policy = ActorPolicy(rules, Widths(rules.agent_dim(backbone), rules.shared_dim(backbone), 1))
    lengths = [torch.tensor([197]), torch.tensor([101]), torch.tensor([51]), torch.tensor([51])]
    cost = Cost(backbone)
    per_agent = 201 * 64 + 64 * 64 + 64 * 2 + 201
    per_decision = 192 * 64 + 192  # the shared view, through the perceptron and past it
    expected = (196 + 100) * per_agent + 2 * per_decision + (197 + 101) * 192
    assert cost.decision_macs(policy, lengths, lengths).item() == expected
    # A heuristic pays for the class token's row only.
    top = TopK(rules, 0.5)
    assert cost.decision_macs(top, lengths, lengths).item() == (197 + 101) * 192


def merging(backbone: Backbone) -> ActorPolicy:
    features: tuple[str, ...] = ("similarity", "size", "token", "keys")
    if backbone.has_class_token:
        features += ("cls_attention",)
    rules = LayerMerge((1, 3, 4), features=features)
    widths = Widths(rules.agent_dim(backbone), rules.shared_dim(backbone), 1)
    torch.manual_seed(0)
    policy = ActorPolicy(rules, widths, hidden=(16, 8))
    policy.lean_on(slice(1, 2), 5.0)  # the more similar pairs
    return policy


def pruning(backbone: Backbone) -> GatedPolicy:
    features: tuple[str, ...] = ("keys",)
    if backbone.has_class_token:
        features += ("cls_attention", "redundancy")
    rules = LayerPrune((1, 3, 4), "tokens", features=features)
    own, shared = rules.agent_dim(backbone), rules.shared_dim(backbone)
    widths = {"key": shared - 6, "own": own, "patches": backbone.patches}
    torch.manual_seed(1)
    policy = GatedPolicy(rules, widths, width=16, initial_gate=0.5)
    for parameter in policy.parameters():
        parameter.data += torch.randn_like(parameter)
    return policy


@pytest.mark.parametrize("kind", ["strongest", "merging", "pruning"])
def test_closed_form_of_decisions_in_the_block_agrees_with_torchs_counter(
    backbone: Backbone, kind: str
) -> None:
    """The counter sees products of matrices, not the cosines of pairs: those are added by hand."""
    policy: Method = {
        "strongest": lambda: MergeStrongest(LayerMerge((0, 2, 5)), 3),
        "merging": lambda: merging(backbone),
        "pruning": lambda: pruning(backbone),
    }[kind]()
    cost, generator = Cost(backbone), torch.Generator().manual_seed(0)
    images = torch.randn(6, 3, 96, 96, generator=generator)
    images *= torch.linspace(0.2, 3, 6)[:, None, None, None]
    totals, idle = set(), 0
    for one in images.split(1):
        with torch.no_grad():
            episode = play(backbone, policy, one, "padded")
        counted = executed_macs(lambda one=one: play(backbone, policy, one, "padded"))
        if kind == "merging":  # three products of width D for each candidate, see "token"
            visual = [int(n) for n in episode.counts[:-1]]
            counted += sum(3 * backbone.dim * -(-n // 2) for n in visual)
        lengths = episode.attended, episode.fed
        closed = cost.backbone_macs(*lengths) + cost.decision_macs(policy, *lengths)
        assert closed.item() == pytest.approx(counted, rel=1e-9)
        totals.add(counted)
        idle += sum(bool(a == b) for a, b in zip(episode.counts, episode.counts[1:], strict=False))
    assert (len(totals) > 1) == (kind != "strongest")
    if kind == "pruning":
        assert 0 < idle < 18, "closed and open gates should both occur"
    assert episode.counts[-1] < backbone.patches or kind == "pruning"


def test_what_a_gate_costs_by_hand() -> None:
    """DeiT-B, 196 tokens, the paper's widths: papers.md section 1.2 has about 57 MMAC in all."""
    rules = LayerPrune(tuple(range(12)), "tokens")
    policy = GatedPolicy(rules, {"key": 768, "own": 768, "patches": 196}, width=128)
    n, w = 197, 128
    gate = 12 * 16 + (768 + 16 + 3) * 64 + 64
    enter = n * 768 * w + (12 + 3) * w
    encoder = n * (4 * w * w + 2 * w * 256) + 2 * n * n * w
    budget = w * w + w * 96
    selector = w + 196 * (w * 64 + 64)
    ours = 196 * 768 + 12 * (768 + 96)  # the direct paths from feature and block
    agents, removed = torch.tensor([196.0, 196.0]), torch.tensor([0.0, 8.0])
    closed, opened = policy.macs(agents, removed).tolist()
    assert closed == gate
    assert opened == gate + enter + encoder + budget + selector + ours
    assert opened == pytest.approx(57e6, rel=0.02)


def everywhere(backbone: Backbone) -> list[Method]:
    """Methods that decide in the last block, between its halves or before it, or not at all."""
    last = backbone.depth - 1
    words = [
        "keep-all", "tome:r=5", f"random:keep=0.5,blocks=1/{last}", "pitome:keep=0.8",
        f"norm:keep=0.6,blocks=2/{last}", "merge-above:similarity=0.2",
    ]  # fmt: skip
    return [learned(backbone), *(parse_policy(word, backbone.depth) for word in words)]


def test_what_is_executed_is_what_torch_counts(backbone: Backbone) -> None:
    """A pass for the logits leaves out of the last block what the head doesn't read."""
    cost, image = Cost(backbone), torch.randn(1, 3, 96, 96)
    for method in everywhere(backbone):
        with torch.no_grad():
            episode = play(backbone, copy.deepcopy(method), image, "padded")

        def run(method: Method = method) -> Episode:
            return play(backbone, copy.deepcopy(method), image, "padded", only_logits=True)

        with torch.no_grad():
            assert_close(run().logits, episode.logits, atol=1e-5, rtol=0)
        executed = cost.executed(episode, method).item()
        assert executed == pytest.approx(executed_macs(run), rel=1e-9)
        assert (executed < cost.of(episode, method).item()) == backbone.reads_prefix
    dense = play(backbone, parse_policy("keep-all", backbone.depth), image)
    assert cost.executed(dense, parse_policy("keep-all", backbone.depth)).item() == pytest.approx(
        cost.dense_executed()
    )
