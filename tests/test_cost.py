"""Multiply-adds: known totals, and the closed form against what is really executed."""

import pytest
import timm
import torch

from agents.heuristics import TopK
from agents.policy import ActorPolicy, Widths
from tokenenv.backbone import Backbone
from tokenenv.cost import Cost, measured_macs
from tokenenv.metrics import play
from tokenenv.rules import TokenPrune


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
        counted = measured_macs(lambda one=one: play(backbone, policy, one, "padded"))
        lengths = episode.attended, episode.fed
        closed = cost.backbone_macs(*lengths) + cost.decision_macs(policy.rules, policy, *lengths)
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
    expected = (196 + 100) * per_agent + 2 * 192 * 64 + (197 + 101) * 192
    assert cost.decision_macs(rules, policy, lengths, lengths).item() == expected
    # A heuristic pays for the class token's row only.
    top = TopK(rules, 0.5)
    assert cost.decision_macs(top.rules, top, lengths, lengths).item() == (197 + 101) * 192
