"""Images are decoded ahead of their use, and nothing else changes."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from image_folders import corrupt, make_folder
from PIL import Image
from torch import nn

from tokenenv.data import ImageSource, Stream, open_source
from tokenenv.data import pixels as module
from tokenenv.data.pixels import PixelStore, Preprocess


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "images", {"0": 9, "1": 9})


@pytest.fixture
def opened(folder: Path, digits_model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> ImageSource:
    monkeypatch.setattr("tokenenv.data.opening.DECODE_THREADS", 2)
    monkeypatch.setattr(module, "CACHE_BYTES", 0)
    return open_source(str(folder), digits_model)


def drawn(stream: Stream, count: int) -> list[tuple[list[int], torch.Tensor]]:
    return [(batch.index.tolist(), batch.images) for batch in (stream.next() for _ in range(count))]


def same(one: Any, other: Any) -> bool:
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(one, other, strict=True))


def test_the_next_batch_is_decoded_while_this_one_is_used(
    opened: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, caller, decoded = opened._store, threading.get_ident(), threading.Semaphore(0)
    decode = PixelStore._decode

    def noticed(self: PixelStore, position: int) -> Any:
        assert threading.get_ident() != caller
        found = decode(self, position)
        decoded.release()
        return found

    monkeypatch.setattr(PixelStore, "_decode", noticed)
    stream = Stream(opened, 4, seed=0)
    stream.next()
    for _ in range(8):  # this batch and the next, though nobody has asked for that
        assert decoded.acquire(timeout=30)
    monkeypatch.setattr(store, "_load", lambda position: pytest.fail("decoded twice"))
    monkeypatch.setattr(store, "expect", lambda positions: None)
    assert len(stream.next().index) == 4


def test_what_is_read_stays_the_same(
    folder: Path, opened: ImageSource, digits_model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With unreadable images, over epochs, and after a resume within one."""
    corrupt(folder)
    monkeypatch.setattr("tokenenv.data.opening.DECODE_THREADS", 2)
    ahead = Stream(open_source(str(folder), digits_model), 5, seed=3)
    monkeypatch.setattr("tokenenv.data.opening.DECODE_THREADS", 1)
    plain = Stream(open_source(str(folder), digits_model), 5, seed=3)
    expected = drawn(plain, 12)
    assert same(drawn(ahead, 7), expected[:7])
    later = Stream(open_source(str(folder), digits_model), 5, seed=0)
    later.load_state_dict(ahead.state_dict())
    assert same(drawn(later, 5), expected[7:]) and same(drawn(ahead, 5), expected[7:])


def test_no_more_is_decoded_ahead_than_fits(
    opened: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened._store
    monkeypatch.setattr(module, "AHEAD_BYTES", 3 * 64)
    opened.expect(torch.arange(10))
    assert len(store._coming) == 3
    assert len(opened.batch(torch.arange(10)).index) == 10 and not store._coming
    opened.expect(torch.arange(2))
    opened.expect(torch.arange(1, 3))
    assert set(store._coming) == {1, 2}  # what is expected no longer is forgotten


def test_copies_and_forked_processes_have_threads_of_their_own(opened: ImageSource) -> None:
    opened.expect(torch.arange(4))
    expected = opened.batch(torch.arange(8)).images
    opened.expect(torch.arange(4))
    for twin in (copy.deepcopy(opened._store), copy.copy(opened._store)):
        assert twin._pool is None and not twin._coming
    child = os.fork()
    if not child:
        found = opened.batch(torch.arange(8)).images
        os._exit(0 if torch.equal(found, expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def load(position: int) -> Image.Image:
    return Image.new("L", (8, 8), position)


def test_a_store_can_be_pickled_if_its_reader_can(digits_model: nn.Module) -> None:
    store = PixelStore(load, Preprocess(digits_model), threads=2)
    store.expect([1, 2])
    assert torch.equal(pickle.loads(pickle.dumps(store)).read([2])[0], store.read([2])[0])
