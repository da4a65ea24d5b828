"""An HTTP service that runs requests together, and a load test of it beside the dense model.

    pip install starlette uvicorn httpx        # of this example alone
    tokenenv compress merge-above:similarity=0.9 --model deit_tiny_patch16_224 --out fast
    python examples/serve.py run fast --port 8000
    curl --data-binary @cat.jpg http://127.0.0.1:8000/predict
    python examples/serve.py load fast --images photographs --clients 16

While a batch runs, the requests that arrive wait, and the next batch takes them all (at most
``--batch``): an idle service answers at once, a busy one has large batches. A method that keeps as
many tokens as an image needs gives images of unlike length; packed execution computes no padding.

``load`` starts the dense model and the compressed one, each in a process on this machine, and loads
them in turns, each client sending its next image when it has the answer to the last. The clients
take processor time, too.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from tokenenv import UserError, load_compressed
from tokenenv.cli.options import positive
from tokenenv.errors import run_script

Run = Callable[[list[Tensor]], list[Tensor]]
"""Runs images; an answer for each."""

WAITING = 1024
"""Requests that may wait; more are told to come back."""


class Full(Exception):
    """Too many requests are waiting."""


class Batches:
    """Runs what waits together, one batch after the other.

    Args:
        run: runs a batch, in a thread of its own.
        most: images in a batch.
    """

    def __init__(self, run: Run, most: int) -> None:
        self._run, self._most = run, most
        self._waiting: asyncio.Queue[tuple[Tensor, asyncio.Future[Tensor]]] = asyncio.Queue(WAITING)

    async def __call__(self, image: Tensor) -> Tensor:
        """The answer to an image.

        Raises:
            Full: too many requests are waiting.
        """
        answer: asyncio.Future[Tensor] = asyncio.get_running_loop().create_future()
        try:
            self._waiting.put_nowait((image, answer))
        except asyncio.QueueFull:
            raise Full from None
        return await answer

    async def work(self) -> None:
        """Run batches without end."""
        while True:
            batch = [await self._waiting.get()]
            while len(batch) < self._most and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            batch = [(image, answer) for image, answer in batch if not answer.cancelled()]
            if not batch:
                continue
            try:
                found = await asyncio.to_thread(self._run, [image for image, _ in batch])
            except Exception as error:  # the next batch may be a good one
                for _, answer in batch:
                    if not answer.cancelled():
                        answer.set_exception(error)
                continue
            for (_, answer), one in zip(batch, found, strict=True):
                if not answer.cancelled():  # the client may have gone
                    answer.set_result(one)


def service(folder: str, most: int, dense: bool):  # type: ignore[no-untyped-def]
    """The application that serves a compressed model, or its dense model."""
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    fast = load_compressed(folder)
    model, preprocess, names = fast.model if dense else fast, fast.preprocess, fast.classes
    like = fast.backbone

    @torch.inference_mode()
    def run(pixels: list[Tensor]) -> list[Tensor]:
        images = preprocess.normalise(pixels).to(like.device, like.dtype)
        return list(model(images).float().softmax(1).cpu())

    batches = Batches(run, most)

    async def predict(request: Request) -> JSONResponse:
        try:
            image = await asyncio.to_thread(decoded, await request.body())
            pixels = await asyncio.to_thread(preprocess.pixels, image)
        except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            return JSONResponse({"error": f"no image: {error}"}, 400)
        try:
            chances = await batches(pixels)
        except Full:
            return JSONResponse({"error": "busy: come back later"}, 503)
        best = int(chances.argmax())
        name = str(best) if names is None else names[best]
        return JSONResponse({"class": name, "probability": float(chances[best])})

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({"method": "dense" if dense else fast.method})

    @asynccontextmanager
    async def working(app: Starlette) -> AsyncIterator[None]:
        run([torch.zeros(like.image_shape, dtype=torch.uint8)])  # the first pass is slow
        task = asyncio.create_task(batches.work())
        yield
        task.cancel()

    routes = [Route("/predict", predict, methods=["POST"]), Route("/health", health)]
    return Starlette(routes=routes, lifespan=working)


def decoded(content: bytes) -> Image.Image:
    """The image in a file's content."""
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


async def load(port: int, contents: list[bytes], clients: int, seconds: float) -> list[float]:
    """Latencies, seconds, of requests by clients that send one after the other."""
    import httpx

    took: list[float] = []
    address, until = f"http://127.0.0.1:{port}/predict", time.perf_counter() + seconds

    async def one(client: httpx.AsyncClient, first: int) -> None:
        number = first
        while time.perf_counter() < until:
            start = time.perf_counter()
            answer = await client.post(address, content=contents[number % len(contents)])
            answer.raise_for_status()
            took.append(time.perf_counter() - start)
            number += clients

    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(timeout=60, limits=limits) as client:
        await asyncio.gather(*(one(client, first) for first in range(clients)))
    return took


def compare(args: argparse.Namespace) -> None:
    """Load the dense and the compressed model in turns; print what they do."""
    files = sorted(file for file in Path(args.images).rglob("*") if file.is_file())[:512]
    if not files:
        raise UserError(f"'{args.images}' holds no file: give a folder of images")
    contents, servers = [file.read_bytes() for file in files], dict[str, tuple[int, Server]]()
    try:
        for name, more in (("dense", ["--dense"]), ("reduced", [])):
            servers[name] = started(args.folder, args.batch, args.threads, more)
        took: dict[str, list[list[float]]] = {name: [] for name in servers}
        for turn in range(args.rounds + 1):
            for name, (port, _) in servers.items():
                found = asyncio.run(load(port, contents, args.clients, args.seconds))
                if turn:  # the first one warms up
                    took[name].append(found)
    finally:
        for _, server in servers.values():
            server.terminate()
    for name, rounds in took.items():
        rates = [len(each) / args.seconds for each in rounds]
        every = sorted(1e3 * each for part in rounds for each in part)
        last = every[int(0.99 * (len(every) - 1))]
        print(
            f"{name:8} {statistics.median(rates):6.1f} images/s, {min(rates):.1f} to "
            f"{max(rates):.1f}; latency: median {statistics.median(every):.0f} ms, 99th percentile "
            f"{last:.0f} ms; {len(every)} requests"
        )


Server = subprocess.Popen[bytes]


def started(folder: str, most: int, threads: int, more: list[str]) -> tuple[int, Server]:
    """A server in a process of its own: its port, and the process."""
    import httpx

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "run", folder, "--port", str(port), *more]
    server = subprocess.Popen([*command, "--batch", str(most), "--threads", str(threads)])
    while server.poll() is None:
        try:
            httpx.get(f"http://127.0.0.1:{port}/health", timeout=1)
            return port, server
        except httpx.HTTPError:
            time.sleep(0.2)
    raise UserError(f"the service of '{folder}' ended before it answered: see its words above")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    serve, test = commands.add_parser("run"), commands.add_parser("load")
    for each in (serve, test):
        each.add_argument("folder", help="what 'tokenenv compress' or 'tokenenv tune' wrote")
        each.add_argument("--batch", type=positive, default=16, help="at most so many together")
        each.add_argument("--threads", type=positive, default=torch.get_num_threads())
    serve.add_argument("--port", type=positive, default=8000)
    serve.add_argument("--dense", action="store_true", help="serve its dense model")
    test.add_argument("--images", required=True, help="folder of images to send")
    test.add_argument("--clients", type=positive, default=16)
    test.add_argument("--seconds", type=positive, default=10, help="of a round")
    test.add_argument("--rounds", type=positive, default=3)
    args = parser.parse_args()
    if args.command == "load":
        compare(args)
        return
    import uvicorn

    torch.set_num_threads(args.threads)
    app = service(args.folder, args.batch, args.dense)
    uvicorn.run(app, host="127.0.0.1", port=args.port, log_level="warning")


if __name__ == "__main__":
    run_script(main)
