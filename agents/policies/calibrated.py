"""Baselines that images tell how many tokens to merge: thresholds, and mean counts of a policy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from agents.policies.heuristics import MergeAbove, MergeStrongest, check_pairs
from tokenenv.data import open_source
from tokenenv.errors import UserError
from tokenenv.game.episode import Episode, default_execution
from tokenenv.game.policy import Method, Policy, play
from tokenenv.game.rules import LayerMerge, Observation
from tokenenv.vit.backbone import Backbone

MOST, LEAST = 256, 32
"""How many images are read at most, and at least."""

_BATCH = 64


class Uncalibrated(Policy):
    """A policy whose numbers are measured on images when the model is known."""

    def next_action(self, episode: Episode) -> NoReturn:
        """Raise :class:`UserError`: :meth:`calibrated` gives the policy that acts."""
        self._refuse()

    def act(self, observation: Observation) -> NoReturn:
        """As :meth:`next_action`."""
        self._refuse()

    def config(self) -> dict[str, Any]:
        """Raise :class:`UserError`: :meth:`calibrated` gives the policy to save."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UserError(f"{type(self).__name__} isn't calibrated: call calibrated(backbone) first")


@dataclass
class DToMe(Uncalibrated):
    """Dynamic token merging (DToMe of DyMU, Wang et al. 2025, arXiv 2504.17040, section 3.1).

    Block by block, the candidate pairs of ToMe's matching are ranked by similarity over all
    calibration images. The similarity of the ``r n``-th of ``n`` images is the block's threshold:
    ``r`` pairs merge on average, more where an image is redundant. The next block is calibrated on
    what these merges leave.

    Attributes:
        rules: the game.
        r: mean number of pairs merged in each block, one number for all, or one for each.
        images: a folder of class/image to calibrate on, for instance training images; empty: those
            that belong to the model.
    """

    rules: LayerMerge
    r: int | tuple[int, ...]
    images: str = ""

    def __post_init__(self) -> None:
        MergeStrongest(self.rules, self.r)  # its checks

    @torch.inference_mode()
    def calibrated(self, backbone: Backbone) -> MergeAbove:
        """The policy with a threshold in each block.

        Raises:
            UserError: the images can't be read, or are too few.
        """
        wanted = self.r if isinstance(self.r, tuple) else (self.r,) * len(self.rules.blocks)
        blocks = tuple(b for b, r in zip(self.rules.blocks, wanted, strict=True) if r)
        if not blocks:
            raise UserError("r=0 merges nothing: give 1 or more in some block")
        rules = replace(self.rules, blocks=blocks, features=("similarity",), share=False)
        images, found = calibration_images(backbone, self.images), list[float]()
        episode = Episode(backbone, rules, images, execution=default_execution(backbone.device))
        for r in filter(None, wanted):
            match = episode.moment.match
            assert match is not None
            ranked = match.score.flatten().sort(descending=True).values
            possible = int((ranked > -torch.inf).sum())
            least = ranked[min(r * len(images), possible) - 1]
            found.append(least.clamp(-1.0, 1.0).item())
            episode.act(match.score >= least)
        return MergeAbove(rules, tuple(found))


@dataclass
class MeanCounts(Uncalibrated):
    """ToMe that merges in each block as many pairs as another method removes tokens on average.

    The schedule of a policy without its choice for each image.

    Attributes:
        rules: the game; its blocks are replaced by the method's.
        method: the other method.
        images: a folder of class/image to count on; empty: those that belong to the model.
    """

    rules: LayerMerge
    method: Method
    images: str = ""

    @torch.inference_mode()
    def calibrated(self, backbone: Backbone) -> MergeStrongest:
        """ToMe with these counts.

        Raises:
            UserError: the images can't be read, or are too few.
        """
        method = self.method.calibrated(backbone)
        method.check_fit(backbone, backbone.architecture)
        method.on(backbone.device)
        counts = [
            torch.stack(play(backbone, method, images).counts)
            for images in calibration_images(backbone, self.images).split(_BATCH)
        ]
        removed = -torch.cat(counts, 1).double().mean(1).diff()
        r = tuple(check_pairs(round(each)) for each in removed.tolist())
        return MergeStrongest(replace(self.rules, blocks=method.reduction.blocks), r)


def calibration_images(backbone: Backbone, folder: str) -> Tensor:
    """``(n, C, H, W)`` images to calibrate on, at most :data:`MOST`, on the backbone's device.

    Args:
        backbone: the model.
        folder: of class/image, or a data set that :func:`tokenenv.data.open_source` knows; empty:
            the images that belong to the model.

    Raises:
        UserError: they can't be read, or there are fewer than :data:`LEAST`.
    """
    read = _READ.setdefault(backbone, {})
    if folder not in read:
        source = open_source(folder or None, backbone.model, split="train", limit=MOST)
        read.clear()
        read[folder] = source.batch(torch.arange(len(source))).images
    images = read[folder]
    if len(images) < LEAST:
        raise UserError(
            f"images={folder}: {len(images)} images are too few to calibrate on, give {LEAST} or "
            "more"
        )
    return images.to(backbone.device, backbone.dtype)


_READ: WeakKeyDictionary[Backbone, dict[str, Tensor]] = WeakKeyDictionary()
"""The images read last for each model: a sweep calibrates many methods on the same ones."""
