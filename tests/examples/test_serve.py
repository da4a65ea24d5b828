"""The service's batches, without a network; and its answers, where its framework is installed."""

from __future__ import annotations

import asyncio
import io
import runpy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import write_digits
from torch import Tensor

import tokenenv

SERVE = runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples/serve.py"))


class Slow:
    """Doubles numbers, one batch at a time, each when it is told to."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.began, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, images: list[Tensor]) -> list[Tensor]:
        self.sizes.append(len(images))
        self.began.release()
        assert self.go.acquire(timeout=60)
        if any(image < 0 for image in images):
            raise ValueError("a bad image")
        return [2 * image for image in images]


async def with_batches(run: Slow, most: int, use: Any) -> Any:
    batches = SERVE["Batches"](run, most)
    worker = asyncio.create_task(batches.work())
    try:
        return await use(batches)
    finally:
        worker.cancel()


def test_what_waits_runs_together_and_each_gets_its_own_answer() -> None:
    slow = Slow()

    async def use(batches: Any) -> list[float]:
        first = asyncio.create_task(batches(torch.tensor(1.0)))
        await asyncio.to_thread(slow.began.acquire)  # alone, at once
        rest = [asyncio.create_task(batches(torch.tensor(float(i)))) for i in range(2, 9)]
        await asyncio.sleep(0)
        slow.go.release(4)
        return [float(each) for each in await asyncio.gather(first, *rest)]

    answers = asyncio.run(with_batches(slow, 4, use))
    assert slow.sizes == [1, 4, 3]
    assert answers == [2.0 * i for i in range(1, 9)]


def test_a_failed_batch_and_clients_that_go_don_t_end_the_service() -> None:
    slow = Slow()
    slow.go.release(10)

    async def use(batches: Any) -> float:
        with pytest.raises(ValueError, match="a bad image"):
            await batches(torch.tensor(-1.0))
        gone = asyncio.create_task(batches(torch.tensor(1.0)))
        await asyncio.sleep(0)
        gone.cancel()
        return float(await batches(torch.tensor(3.0)))

    assert asyncio.run(with_batches(slow, 4, use)) == 6.0


def test_too_many_requests_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SERVE["Batches"].__init__.__globals__, "WAITING", 2)

    async def use() -> None:
        batches = SERVE["Batches"](Slow(), 4)  # nobody works
        waiting = [asyncio.create_task(batches(torch.tensor(1.0))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(SERVE["Full"]):
            await batches(torch.tensor(1.0))
        for each in waiting:
            each.cancel()

    asyncio.run(use())


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("dense", [False, True])
def test_answers_are_those_of_the_model(dense: bool) -> None:
    testing = pytest.importorskip("starlette.testclient")
    pytest.importorskip("httpx")
    tokenenv.compress("digits_vit", "merge-above:similarity=0.8,blocks=3").save("fast")
    fast = tokenenv.load_compressed("fast")
    write_digits(Path("data"), 4)
    files = sorted(Path("data").rglob("*.png"))
    with testing.TestClient(SERVE["service"]("fast", 4, dense)) as client:
        for file in files:
            said = client.post("/predict", content=file.read_bytes()).json()
            if dense:
                pixels = fast.preprocess.normalise(
                    [fast.preprocess.pixels(SERVE["Image"].open(file))]
                )
                best = fast.model(pixels).softmax(1).max(1)
                assert said["class"] == str(int(best.indices))
                assert said["probability"] == pytest.approx(float(best.values.detach()), abs=1e-5)
            else:
                (expected,) = fast.predict(file)
                assert said["class"] == expected.name
                assert said["probability"] == pytest.approx(expected.probability, abs=1e-5)
        assert client.post("/predict", content=b"no image").status_code == 400
        assert client.post("/predict", content=io.BytesIO().getvalue()).status_code == 400
