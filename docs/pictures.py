"""Make the pictures of the documentation again, from generated scenes: ``python docs/pictures.py``.

``before_after`` trains for one to three minutes, the others take seconds. With names only those:
``python docs/pictures.py environments methods``. No picture shows an image of a data set.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import gymnasium
import numpy as np
from PIL import Image

import tokenenv
from tokenenv.envs.ids import IDS
from tokenenv.game.animation import save_gif

PICTURES = Path(__file__).parent / "pictures"

METHODS = (
    "cls-attention:keep=0.5,blocks=1/2/4", "norm:keep=0.5,blocks=1/2/4",
    "random:keep=0.5,blocks=1/2/4", "zerotprune:keep=0.6,blocks=1/2/4", "ats:tokens=50",
    "evit:keep=0.5,blocks=1/2/4", "tome:r=16", "random-merge:r=16", "merge-above:similarity=0.9",
    "mstm:keep=0.5,blocks=1/2/4", "pitome:keep=0.85", "diffrate:prune=8,merge=8",
)  # fmt: skip
SCENE = 3
"""Which test scene all methods reduce."""


def before_after() -> None:
    """The untrained start beside the policy that ``tokenenv train`` makes of it."""
    with tempfile.TemporaryDirectory() as folder:
        run = tokenenv.train("rl4evit", model="scenes_vit", out=Path(folder) / "run")
        shutil.copy(run.folder / "before_after.gif", PICTURES / "before_after.gif")


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
    """What each method leaves of one scene in the end, with what it saves."""
    last = [
        tokenenv.watch(what, index=[SCENE], model="scenes_vit").episodes[0][-1] for what in METHODS
    ]
    rows = [np.concatenate(last[i : i + 3], axis=1) for i in range(0, len(last), 3)]
    sheet = Image.fromarray(np.concatenate(rows))
    sheet.quantize(64).save(PICTURES / "methods.png", optimize=True)


if __name__ == "__main__":
    makers = {f.__name__: f for f in (before_after, environments, methods)}
    for name in sys.argv[1:] or makers:
        makers[name]()
