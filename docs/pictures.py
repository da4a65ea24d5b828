"""Make the pictures and tables of the documentation again: ``python docs/pictures.py``.

With names only those: ``python docs/pictures.py environments scenes``. Pictures of measured figures
(docs/plots.py) come with their tables (docs/measured.py), which are written into the pages. The
others are drawn from generated scenes; no picture shows an image of a data set. ``before_after``
trains for one to three minutes, the others take seconds.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gymnasium
import measured
import numpy as np
import plots
from PIL import Image

import tokenenv
from tokenenv.envs.ids import IDS
from tokenenv.game.animation import save_gif
from tokenenv.storage import write_bytes

PICTURES = Path(__file__).resolve().parent / "pictures"

METHODS = (
    "cls-attention:keep=0.5,blocks=1/2/4", "norm:keep=0.5,blocks=1/2/4",
    "random:keep=0.5,blocks=1/2/4", "zerotprune:keep=0.6,blocks=1/2/4", "ats:tokens=50",
    "evit:keep=0.5,blocks=1/2/4", "tome:r=16", "random-merge:r=16", "merge-above:similarity=0.9",
    "mstm:keep=0.5,blocks=1/2/4", "pitome:keep=0.85", "diffrate:prune=8,merge=8",
)  # fmt: skip
SCENE = 3
"""Which test scene all methods reduce."""


@contextlib.contextmanager
def empty_folder() -> Iterator[None]:
    """Work in a folder that is then removed."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


def before_after() -> None:
    """The untrained start beside the policy that ``tokenenv train`` makes of it; its training."""
    with tempfile.TemporaryDirectory() as folder:
        run = tokenenv.train("rl4evit", model="scenes_vit", out=Path(folder) / "run")
        shutil.copy(run.folder / "before_after.gif", PICTURES / "before_after.gif")
        shutil.copy(run.folder / "curve.png", PICTURES / "training.png")


def environments() -> None:
    """Each registered environment under random legal actions, two episodes."""
    for entry in IDS:
        env = gymnasium.make(entry.id, model="scenes_vit", render_mode="rgb_array").unwrapped
        choose = np.random.default_rng(0)
        episodes = []
        for index in (3, 8):
            env.reset(seed=0, options={"index": index})
            frames, over = [env.render()], False
            while not over:
                *_, over, _, _ = env.step(random_action(env, choose))
                frames.append(env.render())
            episodes.append(frames)
        save_gif(PICTURES / f"{entry.id.split('/')[1]}.gif", episodes)


def random_action(env: gymnasium.Env, choose: np.random.Generator) -> object:
    """A count of at most 16 tokens among the legal ones, or to keep each token with 0.7."""
    if isinstance(env.action_space, gymnasium.spaces.Discrete):
        return choose.choice(np.flatnonzero(env.action_masks())[:5])
    return (choose.random(len(env.action_space.nvec)) < 0.7).astype(np.int64)


def methods() -> None:
    """A sheet, three in a row, of what each method leaves of one scene, with what it saves."""
    last = [
        tokenenv.watch(what, index=[SCENE], model="scenes_vit").episodes[0][-1] for what in METHODS
    ]
    width, height = (max(frame.shape[axis] for frame in last) for axis in (1, 0))
    sheet = Image.new("RGB", (3 * width, -(-len(last) // 3) * height), "white")
    for number, frame in enumerate(last):
        sheet.paste(Image.fromarray(frame), (number % 3 * width, number // 3 * height))
    sheet.quantize(64).save(PICTURES / "methods.png", optimize=True)


def show() -> None:
    """Two methods block by block, as in docs/exploring.md, whose code this is."""
    page = (PICTURES.parent / "exploring.md").read_text(encoding="utf-8")
    with empty_folder():
        exec(re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)[0], {})
        shutil.copy("show.png", PICTURES / "show.png")


def write_tables() -> None:
    """Write all tables of measured figures into their pages."""
    for page in measured.PAGES:
        write_bytes(page, measured.filled(page.read_text(encoding="utf-8")).encode())


MAKERS = (before_after, environments, methods, show)

if __name__ == "__main__":
    makers = {f.__name__: f for f in MAKERS}
    for name in sys.argv[1:] or [*makers, *plots.PLOTS]:
        if name in plots.PLOTS:
            plots.save(PICTURES / f"{name}.png", name)
            write_tables()
        else:
            makers[name]()
