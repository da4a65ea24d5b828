"""Schedule, masks and the IB bound: against plain loops, closed forms and inequalities."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokenenv.vit.digits  # noqa: F401  (registers digits_vit)
from tokenenv import UserError, ltm, open_source
from tokenenv.ltm import bound as ib
from tokenenv.ltm.mask import (
    AttentionMask,
    LinearMask,
    Mask,
    SimilarMask,
    check_half,
    merge,
    unmerge,
)
from tokenenv.ltm.schedule import centres, check_window, closeness, even, flat, shares

CPU = torch.device("cpu")
sides = st.integers(1, 12)


def test_the_schedule_ends_at_the_ratio() -> None:
    left = [flat((14, 14), share)[1] for share in shares(0.6, 12)]
    assert left == [round(196 * 0.6 ** ((block + 1) / 12)) for block in range(12)]
    assert left[-1] == round(196 * 0.6)
    assert even((14, 7), 0.25) == (7, 4)
    assert even((3, 3), 0.001) == (1, 1)


@given(rows=sides, columns=sides, share=st.floats(0.01, 1))
@settings(max_examples=60, deadline=None)
def test_centres_are_the_nearest_tokens(rows: int, columns: int, share: float) -> None:
    smaller = even((rows, columns), share)
    chosen = centres((rows, columns), smaller, CPU)
    assert len(set(chosen.tolist())) == smaller[0] * smaller[1]
    near = closeness((rows, columns), smaller, CPU)
    own = near[chosen, torch.arange(len(chosen))]
    assert torch.allclose(own, near.amax(0), atol=1e-5)


def test_closeness_by_plain_loops() -> None:
    near = closeness((3, 4), (2, 3), CPU)
    for token in range(12):
        for place in range(6):
            row = ((token // 4) + 0.5) * 2 / 3 - (place // 3 + 0.5)
            column = ((token % 4) + 0.5) * 3 / 4 - (place % 3 + 0.5)
            assert near[token, place].item() == pytest.approx(-(row**2) - column**2, abs=1e-6)


def test_windows_say_which_ratios_there_are() -> None:
    for k in range(1, 8):
        check_window((7, 7), (k / 7) ** 2)
        check_window((7, 7), float(f"{(k / 7) ** 2:.3g}"))  # as the message writes it
    check_window((8, 4), 0.25)
    with pytest.raises(UserError, match=r"1 \(8x4\), 0.562 \(6x3\), 0.25 \(4x2\), 0.0625 \(2x1\)"):
        check_window((8, 4), 0.4)


def make(kind: str, hard: bool, recursive: bool = False) -> tuple[Mask, Tensor, tuple[int, int]]:
    torch.manual_seed(0)
    z, smaller = torch.randn(2, 20, 16), (2, 3)
    if kind == "linear":
        mask: Mask = LinearMask(16, 6, hard=hard, recursive=recursive)
        torch.nn.init.normal_(mask.score.weight)
    else:
        mask = AttentionMask(16, 8, hard=hard, recursive=recursive)
    return mask, z, smaller


BOTH = pytest.mark.parametrize("kind", ["linear", "attention"])


@BOTH
@pytest.mark.parametrize("hard", [False, True])
def test_merged_tokens_are_convex_mixes(kind: str, hard: bool) -> None:
    mask, z, smaller = make(kind, hard)
    g = mask(z, (4, 5), smaller, None)
    assert g.shape == (2, 20, 6)
    assert (g >= -1e-7).all()
    assert torch.allclose(g.sum(1), torch.ones(2, 6), atol=1e-5)
    # A constant stays one, forth and back.
    assert torch.allclose(merge(g, torch.ones(2, 20, 3)), torch.ones(2, 6, 3), atol=1e-5)
    assert torch.allclose(unmerge(g, torch.ones(2, 6, 3)), torch.ones(2, 20, 3), atol=1e-4)


@BOTH
def test_masks_by_plain_loops(kind: str) -> None:
    mask, z, smaller = make(kind, hard=False)
    g, y = mask(z, (4, 5), smaller, None), mask.norm(z)
    picked = [5 * row + column for row in (1, 3) for column in (0, 2, 4)]
    assert centres((4, 5), smaller, CPU).tolist() == picked
    for image in range(2):
        score = torch.zeros(20, 6)
        for n in range(20):
            for p in range(6):
                if isinstance(mask, LinearMask):
                    score[n, p] = y[image, n] @ mask.score.weight[p]
                    score[n, p] += 8 * closeness((4, 5), smaller, CPU)[n, p]
                elif isinstance(mask, AttentionMask):
                    query = mask.query.weight @ y[image, n]
                    score[n, p] = query @ mask.key.weight @ y[image, picked[p]] / math.sqrt(8)
        weight = score.exp() if kind == "linear" else score.softmax(1)
        assert torch.allclose(g[image], weight / weight.sum(0), atol=1e-5)


@pytest.mark.parametrize("tokens", [20, 21])
def test_similar_masks_by_plain_loops(tokens: int) -> None:
    torch.manual_seed(0)
    mask, z, left = SimilarMask(16, 8, recursive=False, hard=False), torch.randn(2, tokens, 16), 13
    g, y = mask(z, (1, tokens), (1, left), None), mask.norm(z)
    for image in range(2):
        keys = [mask.key.weight @ token for token in y[image]]
        unit = [(key / key.norm()).detach() for key in keys]
        likeness = {
            a: max(float(unit[a] @ unit[b]) for b in range(1, tokens, 2))
            for a in range(0, tokens, 2)
        }
        gone = sorted(likeness, key=lambda a: -likeness[a])[: tokens - left]
        stay = [n for n in range(tokens) if n not in gone]
        query = [mask.query.weight @ token for token in y[image]]
        score = torch.tensor([[(q @ keys[p]).item() for p in stay] for q in query])
        share = (score / math.sqrt(8)).softmax(1)
        assert torch.allclose(g[image], share / share.sum(0), atol=1e-5)
    g.square().sum().backward()
    assert mask.key.weight.grad is not None
    assert mask.key.weight.grad.abs().sum() > 0


def test_similar_masks_take_half_at_most() -> None:
    mask, z = SimilarMask(16, 8, recursive=False, hard=False), torch.randn(1, 21, 16)
    check_half(21, 10)
    assert mask(z, (1, 21), (1, 10), None).shape == (1, 21, 10)
    with pytest.raises(UserError, match="at least half of a block's 21 tokens, not 9"):
        check_half(21, 9)


def test_shares_fall_in_the_blocks_that_merge() -> None:
    assert shares(0.25, 4, (1, 3)) == [1.0, 0.5, 0.5, 0.25]
    assert shares(0.25, 3, (1, 3)) == [1.0, 0.25, 0.25]  # a shorter stack
    assert shares(0.25, 1, (1, 3)) == [1.0]
    assert shares(0.25, 2) == pytest.approx([0.5, 0.25])


@BOTH
def test_hard_masks_assign_each_token_once_and_learn_as_soft_ones(kind: str) -> None:
    hard, z, smaller = make(kind, hard=True)
    soft, _, _ = make(kind, hard=False)
    g, smooth = hard(z, (4, 5), smaller, None), soft(z, (4, 5), smaller, None)
    strongest = smooth.argmax(2)
    for image in range(2):
        for p in range(6):
            members = strongest[image] == p
            if not members.any():  # nobody's choice: stays soft
                assert torch.allclose(g[image, :, p], smooth[image, :, p], atol=1e-6)
                continue
            expected = torch.where(members, smooth[image, :, p], torch.zeros(20))
            assert torch.allclose(g[image, :, p], expected / expected.sum(), atol=1e-6)
    weight = torch.randn(2, 20, 6)
    for one in (g, smooth):
        (one * weight).sum().backward()
    for (name, p), q in zip(hard.named_parameters(), soft.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-6), name


@BOTH
def test_recursion_needs_the_same_shape(kind: str) -> None:
    mask, z, smaller = make(kind, hard=False, recursive=True)
    plain = mask(z, (4, 5), smaller, None)
    before = torch.rand(2, 20, 6)
    assert torch.equal(mask(z, (4, 5), smaller, before), plain)  # carry starts at 0
    mask.carry.data.fill_(1.0)
    assert torch.equal(mask(z, (4, 5), smaller, before[:, :18]), plain)
    assert torch.equal(mask(z, (4, 5), smaller, None), plain)
    carried = mask(z, (4, 5), smaller, before)
    if kind == "linear":
        expected = plain * before
        assert torch.allclose(carried, expected / expected.sum(1, keepdim=True), atol=1e-5)
    assert not torch.allclose(carried, plain, atol=1e-3)


def test_soft_assign_is_the_formula() -> None:
    x, c = torch.randn(6, 4), torch.randn(3, 4)
    distance = (x[:, None] - c[None]).square().sum(2)
    assert torch.allclose(ib.soft_assign(x, c, 2.5), (-2.5 * distance).softmax(1), atol=1e-5)


def test_the_first_term_is_constant_in_the_weights() -> None:
    """sum_ab phi(X~, a) phi(X, b) log phi(X, b) = sum_b phi(X, b) log phi(X, b), gradient 0."""
    features = torch.randn(32, 6, dtype=torch.double, requires_grad=True)
    phi = ib.soft_assign(features, torch.randn(4, 6, dtype=torch.double), 1.0)
    inputs = torch.randn(32, 7, dtype=torch.double).softmax(1)
    term = torch.einsum("ia,ib->i", phi, inputs * inputs.log()).mean()
    assert term.item() == pytest.approx(ib.input_term(inputs).item(), abs=1e-12)
    (gradient,) = torch.autograd.grad(term, features)
    assert gradient.abs().max() < 1e-15


def test_the_gradient_in_the_mask_is_the_closed_form() -> None:
    """papers: grad_G = -2 beta Z (sum_a phi_a (l_a - lbar) C_a)^T; by autograd and differences."""
    torch.manual_seed(0)
    beta, label = 0.3, torch.tensor([2])
    z = torch.randn(8, 5, dtype=torch.double)
    c = torch.randn(4, 3, 5, dtype=torch.double)
    log_q = torch.randn(4, 6, dtype=torch.double).log_softmax(0)
    g = torch.rand(8, 3, dtype=torch.double).softmax(0).requires_grad_()

    def loss(g: Tensor) -> Tensor:
        phi = ib.soft_assign((g.T @ z).reshape(1, -1), c.flatten(1), beta)
        return ib.label_term(phi, log_q, label)

    (found,) = torch.autograd.grad(loss(g), g)
    phi = ib.soft_assign((g.T @ z).reshape(1, -1), c.flatten(1), beta)[0].detach()
    score = log_q[:, 2]
    pull = ((phi * (score - (phi * score).sum()))[:, None, None] * c).sum(0)
    assert torch.allclose(found, -2 * beta * z @ pull.T, atol=1e-12)
    assert torch.autograd.gradcheck(loss, g)


def test_information_by_plain_loops() -> None:
    torch.manual_seed(0)
    phi, inputs, labels = (
        torch.rand(50, 3).softmax(1),
        torch.rand(50, 4).softmax(1),
        torch.arange(50) % 2,
    )

    def information(joint: Tensor) -> float:
        total = 0.0
        for a in range(joint.shape[0]):
            for b in range(joint.shape[1]):
                p = joint[a, b].item()
                total += p * math.log(p / (joint[a].sum() * joint[:, b].sum()).item())
        return total

    with_inputs = sum(torch.outer(phi[i], inputs[i]) for i in range(50)) / 50
    with_labels = torch.zeros(3, 2)
    for i in range(50):
        with_labels[:, labels[i]] += phi[i] / 50
    expected = information(with_inputs) - information(with_labels)
    found = ib.information_bottleneck(phi, inputs, labels, 2).item()
    assert found == pytest.approx(expected, abs=1e-5)


@given(seed=st.integers(0, 10_000), beta=st.floats(0.5, 30))
@settings(max_examples=40, deadline=None)
def test_the_bound_holds_on_any_data(seed: int, beta: float) -> None:
    """IBB >= IB - H(B), with statistics of other images."""
    torch.manual_seed(seed)
    labels = torch.randint(4, (60,))
    phi = (beta * torch.randn(60, 5)).softmax(1)
    inputs = (beta * torch.randn(60, 6)).softmax(1)
    log_q = torch.randn(5, 4).log_softmax(0)
    bound = ib.input_term(inputs) + ib.label_term(phi, log_q, labels)
    floor = -torch.special.entr(inputs.mean(0)).sum()
    assert bound >= ib.information_bottleneck(phi, inputs, labels, 4) + floor - 1e-5


@pytest.fixture(scope="module")
def model() -> ltm.LTM:
    torch.manual_seed(0)
    return ltm.ltm(timm.create_model("digits_vit", depth=4), 0.4)


def digits_like(n: int = 60) -> tuple[Tensor, Tensor]:
    """Images of ten classes with much noise: X says more than Y does."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 10
    images = torch.randn(10, 1, 8, 8, generator=generator)[labels]
    return images + 2 * torch.randn(n, 1, 8, 8, generator=generator), labels


@pytest.mark.parametrize("kind", ["class", "kmeans"])
@pytest.mark.parametrize("feature", ["blocks", "pooled"])
def test_statistics_come_from_one_pass(model: ltm.LTM, kind: ib.Kind, feature: ltm.Feature) -> None:
    images, labels = digits_like()
    bound = ltm.SeparableBound(model, 12, kind, clusters=8, feature=feature)  # 2 classes unseen
    model.train()
    bound.refresh([(images[:25], labels[:25]), (images[25:], labels[25:])])
    assert model.training
    with torch.no_grad(), model.eval().recording(feature) as features:
        model(images)
    assert len(bound.levels) == len(features) > 0
    for level, found in zip(bound.levels, features, strict=True):
        q = level.log_q.exp()
        clusters = 12 if kind == "class" else 8
        assert q.shape == (clusters, 12)
        assert torch.allclose(q.sum(0), torch.ones(12), atol=1e-5)
        assert torch.allclose(q[:, 10:], torch.full((clusters, 2), 1 / clusters), atol=1e-6)
        phi = ib.membership(found, level.centroids, 10.0)
        for y in range(10):
            assert torch.allclose(q[:, y], phi[labels == y].mean(0), atol=1e-4)
    report = bound.report([(images, labels)])
    assert report.bound == pytest.approx(report.input + report.label, abs=1e-5)
    assert report.bound >= report.ib + report.floor
    assert bound.loss(features, labels).item() == pytest.approx(report.label, abs=1e-4)


def test_the_loss_lowers_the_bound_and_the_bottleneck(model: ltm.LTM) -> None:
    batch = open_source("digits", model, split="train").batch(torch.arange(0, 1197, 8))
    images, labels = batch.images, batch.labels
    bound = ltm.SeparableBound(model, 10)
    bound.refresh([(images, labels)])
    before = bound.report([(images, labels)])
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(10):
        with model.train().recording() as features:
            model(images)
        loss = bound.loss(features, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    after = bound.report([(images, labels)])
    assert after.label < before.label - 0.05
    assert after.ib < before.ib - 0.01
    assert after.input == before.input
    assert after.floor == before.floor


def test_kmeans_finds_what_is_there() -> None:
    middles = torch.eye(4)
    x = torch.nn.functional.normalize(middles.repeat(25, 1) + 0.05 * torch.randn(100, 4), dim=1)
    found = ib.kmeans(x, 4)
    assert torch.equal(found, ib.kmeans(x, 4))
    assert torch.allclose(found.norm(dim=1), torch.ones(4), atol=1e-5)
    with pytest.raises(UserError, match="100 images don't make 200 clusters"):
        ib.kmeans(x, 200)


def test_a_weight_that_is_switched_on() -> None:
    assert [ltm.label_weight(p) for p in (0, 0.29, 0.3, 1)] == [0, 0, ib.ETA, ib.ETA]


def test_bad_input(model: ltm.LTM) -> None:
    images, labels = digits_like()
    bound = ltm.SeparableBound(model, 10)
    with pytest.raises(UserError, match="batches are empty"):
        bound.refresh([])
    with pytest.raises(UserError, match="labels reach from 0 to 10"):
        bound.refresh([(images, labels + (labels == 9))])
    with pytest.raises(UserError, match="no LTM block merges anything"):
        whole = ltm.ltm(timm.create_model("digits_vit", depth=2), 1.0)
        ltm.SeparableBound(whole, 10).refresh([(images, labels)])
    with pytest.raises(UserError, match="clusters=0 is no whole number from 1"):
        ltm.SeparableBound(model, 10, "kmeans", clusters=0)
    with pytest.raises(UserError, match="choose from class, kmeans"):
        ltm.SeparableBound(model, 10, "means")  # type: ignore[arg-type]
