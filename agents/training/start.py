"""``train``: the function that starts every training, from Python or the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agents.training.request import make_request
from agents.training.run import Run
from agents.training.run_folder import resumable, run_folder
from agents.workers import join
from tokenenv.data import Preprocessing


def train(
    system: str | None = None,
    *,
    model: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    images: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    preprocessing: Preprocessing | None = None,
    resume: bool = False,
    after_update: Callable[[int, Any], object] | None = None,
    **settings: Any,
) -> Run:
    """Train a system and write a run folder; the same as ``tokenenv train``.

    Progress is printed. Ctrl-C ends the training after the update in progress; the report is on the
    best policy so far.

    Args:
        system: a name of ``agents.systems.SYSTEMS``, or your own class of settings as
            ``module:Config`` or ``path/to/file.py:Config``. None: ``rl4evit``, and if neither
            model nor data are named it is trained on the embedded ``scenes_vit``.
        model: a timm model; None: the embedded ``digits_vit``.
        weights: a ``.safetensors`` or ``.pth`` state dict, or ``random``; None: the embedded
            weights or timm's.
        data: a folder of class/image, or a torchvision data set such as ``CIFAR10:ROOT``; None: the
            images that belong to the embedded model.
        out: run folder; None: a new one under ``runs``.
        images: number of images of ``data`` to use; None: all.
        seed: of everything drawn at random, from 0 to 2**32 - 1.
        device: ``cpu``, ``cuda`` ...
        dtype: precision of the models: ``float32``, ``bfloat16`` or ``float16``.
        preprocessing: replaces timm's for the model; kept in the run's ``config.json``.
        resume: continue the run in ``out``.
        after_update: called before the first update and after each with the number of updates done
            and the policy as it is then, which it must not change.
        **settings: settings of the system, see ``tokenenv train SYSTEM --list-settings``. A tuple
            may also be given as a list, or in the command line's form, such as ``"64/64"``.

    Returns:
        The run. If ``torchrun`` started several processes, each returns one, and only that of the
        first has a report.

    Raises:
        UserError: an argument is wrong; the message names it and the remedy. An unknown setting
            is a ``TypeError`` as well.

    Example:
        Two short runs of MAPPO, and the result of the second::

            for seed in (0, 1):
                run = tokenenv.train("rl4evit", seed=seed, updates=20, hidden=[64, 64])
            print(run.report["top1"], run.policy.threshold)
    """
    request = make_request(
        system, model=model, weights=weights, data=data, out=out, images=images, seed=seed,
        device=device, dtype=dtype, preprocessing=preprocessing, resume=resume,
        after_update=after_update, **settings,
    )  # fmt: skip
    with (
        join(device) as (workers, place),
        workers.quiet(),
        contextlib.ExitStack() as stack,
    ):
        here = dataclasses.replace(request.model, device=place)
        request = dataclasses.replace(request, model=here)
        with workers.together():
            # Only the first process writes; the others need no folder.
            folder = request.out or Path()
            if not workers.rank:
                folder = stack.enter_context(run_folder(request))
            training = request.config.training(request, workers, folder)
        with resumable(folder):
            return training.run()
