"""Values of models that are no numbers any more."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import backbone, source

from agents.policies.words import parse_policy
from tokenenv import ltm
from tokenenv.errors import UserError
from tokenenv.measure.evaluation import dense_predictions, evaluate, evaluate_model
from tokenenv.reducers import EViT
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.dense import Dense


def overflowing(name: str = "head.weight") -> Backbone:
    """Each weight of it is finite; they became so large after it was made and proven."""
    made = Backbone(copy.deepcopy(backbone().model))
    with torch.no_grad():
        made.model.get_parameter(name).fill_(3e38)
    return made


def test_logits_that_are_not_finite() -> None:
    some, method = source().subset(8, 0), EViT((1, 2), 0.5)
    words = r"values that are not finite for images of 'digits.*check its weights"
    with pytest.raises(UserError, match=words):
        dense_predictions(overflowing(), some)
    with pytest.raises(UserError, match=words):
        evaluate(overflowing(), method, some, dense=torch.zeros(8, dtype=torch.long))
    with pytest.raises(UserError, match=words):  # the dense model alone
        evaluate(backbone(), method, some, reference=overflowing())
    model = ltm.ltm(overflowing().model, 0.8).eval()
    with pytest.raises(UserError, match=words):
        evaluate_model(model, Dense(backbone().model), some, lengths=model.lengths)
    assert len(evaluate(backbone(), method, some).labels) == 8


@pytest.mark.parametrize(
    "what", ["tome:r=8", "pitome:keep=0.6", "evit:keep=0.5", "zerotprune:keep=0.5"]
)
def test_tokens_that_are_not_finite(what: str) -> None:
    """Methods that look for the most similar token find none among NaN."""
    backbone, some = overflowing("blocks.0.attn.proj.bias"), source().subset(8, 0)
    with pytest.raises(UserError, match="values that are not finite for images of 'digits"):
        evaluate(backbone, parse_policy(what, backbone.depth), some)
