"""Training on as many images as ImageNet has touches only those that it uses."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import tokenenv
from agents.training import request
from tokenenv.data import ImageSource, open_source
from tokenenv.data.pixels import PixelStore
from tokenenv.game.dense import DenseAnswers

COUNT = 1_281_167
QUICK: dict[str, Any] = {
    "updates": 3, "evaluate_every": 3, "batch": 8, "hidden": [8], "epochs": 1, "minibatches": 1,
    "calibrate": 1, "blocks": [1, 4],
}  # fmt: skip


class Repeated:
    """Digits, again and again; it notes which images were decoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.decoded: set[int] = set()
        self._lock = threading.Lock()
        monkeypatch.setattr(request, "open_source", self.open)

    def open(self, data: Any, model: Any, split: str, **options: Any) -> ImageSource:
        few = open_source(data, model, split=split, **options)  # type: ignore[arg-type]
        if split != "train":
            return few
        load = few._store._load

        def noted(position: int) -> Any:
            with self._lock:
                self.decoded.add(position)
            return load(position % len(few))

        store = PixelStore(noted, few._store.preprocess, threads=2)
        labels = few.labels.repeat(-(-COUNT // len(few)))[:COUNT]
        return ImageSource("many", [str(i) for i in range(COUNT)], labels, store)


def test_only_what_is_used_is_decoded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    many, asked = Repeated(monkeypatch), list[int]()
    call = DenseAnswers.__call__

    def counted(self: DenseAnswers, index: torch.Tensor, images: torch.Tensor) -> Any:
        if not self.kept:  # the picture at the end has a game of its own
            asked.append(len(index))
        return call(self, index, images)

    monkeypatch.setattr(DenseAnswers, "__call__", counted)
    run = tokenenv.train("rl4evit", out=tmp_path / "run", held_most=20, **QUICK)
    assert run.config["images"] == COUNT
    assert asked == [2, 2, 2]  # eight copies of two images, four times each
    held, drawn, ahead = 20, 3 * 2, 2
    assert held + drawn <= len(many.decoded) <= held + drawn + ahead


def test_no_more_is_held_back_than_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = request.make_request("rl4evit", held_most=100)
    source = open_source("digits", asked.model.open_backbone().model, split="train")
    fit, held = asked.divide(source)
    assert (len(fit), len(held)) == (len(source) - 100, 100)
    fit, held = request.make_request("rl4evit", held_most=10**6).divide(source)
    assert len(held) == round(0.3 * len(source))  # the share that digits have
