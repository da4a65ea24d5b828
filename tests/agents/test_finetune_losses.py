"""The losses of fine-tuning, and how images are shared."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import backbone, source

from agents.finetune.config import EViTConfig
from agents.finetune.losses import logit_loss, token_loss
from agents.finetune.student import Played, Student
from tokenenv.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


def test_token_loss_is_what_plain_loops_give() -> None:
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(2, 3, 4, generator=rng)
    dense = torch.randn(2, 5, 4, generator=rng)
    owner = torch.tensor([[0, 0, 2, -1, 2], [1, -1, -1, -1, 1]])
    there = torch.tensor([[True, False, True], [False, True, False]])
    played = Played(torch.zeros(2, 2), features, owner, there, torch.zeros(()))
    per_image = []
    for b in range(2):
        errors = []
        for token in range(3):
            if there[b, token]:
                patches = [p for p in range(5) if owner[b, p] == token]
                mean = torch.stack([dense[b, p] for p in patches]).mean(0)
                errors.append(((features[b, token] - mean) ** 2).mean())
        per_image.append(torch.stack(errors).mean())
    assert token_loss(played, dense).item() == pytest.approx(torch.stack(per_image).mean().item())


def test_logit_loss_is_a_divergence() -> None:
    logits, dense = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([[0.0, 1.0, 3.0]])
    p, q = dense.softmax(1), logits.softmax(1)
    assert logit_loss(logits, dense).item() == pytest.approx((p * (p / q).log()).sum().item())
    assert logit_loss(dense + 2, dense).item() == pytest.approx(0, abs=1e-6)


def test_a_student_that_loses_nothing_is_its_teacher() -> None:
    student = Student(copy.deepcopy(backbone().model), EViTConfig(keep=1.0).method(backbone(), ""))
    batch = source().batch(torch.arange(4)).images
    played = student.eval()(batch)
    dense = backbone().model.forward_features(batch)[:, 1:]
    torch.testing.assert_close(played.logits, backbone()(batch), rtol=0, atol=1e-5)
    assert token_loss(played, dense).item() < 1e-9
    assert logit_loss(played.logits, backbone()(batch)).item() < 1e-6


def test_shares_are_disjoint_and_equally_long() -> None:
    parts = [source().share(rank, 3) for rank in range(3)]
    assert [len(part) for part in parts] == [33, 33, 33]
    files = [file for part in parts for file in part.files]
    assert len(set(files)) == 99
    with pytest.raises(UserError, match="200 processes"):
        source().share(0, 200)


def test_pruned_patches_have_no_owner() -> None:
    student = Student(copy.deepcopy(backbone().model), EViTConfig(fuse=False, keep=0.5).method(
        backbone(), ""
    ))  # fmt: skip
    played = student.eval()(source().batch(torch.arange(2)).images)
    assert (played.owner >= 0).sum(1).tolist() == played.there.sum(1).tolist() == [8, 8]
