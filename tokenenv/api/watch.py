"""Watch a method decide: one frame per decision and image."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tokenenv.api.opening import open_candidates
from tokenenv.data import Preprocessing, open_source
from tokenenv.errors import UserError, check_keywords
from tokenenv.game.animation import save_gif
from tokenenv.game.checks import check_whole
from tokenenv.game.render import Pixels
from tokenenv.measure.candidate import MethodCandidate
from tokenenv.measure.opening import named_model, text
from tokenenv.measure.token_pictures import spread
from tokenenv.measure.watching import check_watchable, frames, see
from tokenenv.paths import as_path


@dataclass(frozen=True, repr=False)
class Watched:
    """The frames of a method's episodes.

    Attributes:
        what: the method, as it was named.
        model: timm's name of the dense model.
        episodes: for each image its frames ``(H, W, 3)`` uint8: before the first decision, and
            after each one.
    """

    what: str
    model: str
    episodes: list[list[Pixels]]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the frames as an animated GIF, atomically.

        Raises:
            UserError: the suffix is another than ``.gif``, or the file can't be written.
        """
        save_gif(as_path(path, "path"), self.episodes)

    def __repr__(self) -> str:
        frames = sum(map(len, self.episodes))
        return (
            f"<Watched {self.what} on {self.model}: {len(self.episodes)} images, {frames} frames>"
        )


@check_keywords
def watch(
    what: Any,
    *,
    index: Sequence[int] | None = None,
    model: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    data: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    preprocessing: Preprocessing | None = None,
    trust: bool = False,
) -> Watched:
    """Draw what each decision of a method leaves of some images; as ``tokenenv watch``.

    A frame shows the tokens after a decision, their number, the multiply-adds saved so far
    (1 MAC = 1 FLOP, decisions included), and the most probable classes of the dense model and of
    the model that goes on with these tokens and removes no further one.

    Args:
        what: a method as for :func:`tokenenv.evaluate`.
        index: positions of the images in the data, from 0; None: three spread over the data.
        model: timm's name of the model; None: the one ``what`` was trained on, else ``digits_vit``.
        weights: a ``.safetensors`` or ``.pth`` state dict, or ``"random"``; None: the embedded
            weights or timm's.
        data: a folder of class/image, or a torchvision data set such as ``"CIFAR10:ROOT"``; None:
            those that belong to an embedded model.
        device: ``"cpu"``, ``"cuda"`` ...
        preprocessing: replaces that of the run or the model that ``what`` names, or timm's.
        trust: whether to run third-party code that a saved method names.

    Raises:
        UserError: an argument is wrong, or the method takes no decisions about tokens.
    """
    opened = open_candidates(
        [what],
        named_model(model, weights, device, "float32", preprocessing),
        data=text(data, "data"),
        trust=trust,
    )
    (candidate,) = opened.candidates
    if not isinstance(candidate, MethodCandidate):
        raise UserError(
            f"'{candidate.what}' merges tokens inside its blocks and takes no decisions to watch: "
            "take a policy or a method such as tome:r=8"
        )
    check_watchable(candidate.what, candidate.method)
    source = open_source(text(data, "data"), opened.dense.model, split="test")
    chosen = spread(source, 3) if index is None else _positions(index, len(source), source.name)
    batch = source.batch(chosen)
    if not len(batch.index):
        raise UserError(f"none of the images of '{source.name}' could be read: check the files")
    on, methods = {candidate.what: candidate.backbone}, {candidate.what: candidate.method}
    episodes = frames(see(on, opened.dense, methods, source, batch))
    return Watched(candidate.what, opened.model.name, episodes)


def _positions(index: Sequence[int], count: int, name: str) -> torch.Tensor:
    for position in index:
        check_whole("index", position, 0)
        if position >= count:
            raise UserError(
                f"index={position} is outside '{name}', which has {count} images: give numbers "
                f"from 0 to {count - 1}"
            )
    if not len(index):
        raise UserError("index names no image: give positions such as 3,5")
    return torch.tensor(list(index))
