"""The picture ``tokens.png`` of a run folder: which tokens a policy removes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tokenenv.data import ImageSource
from tokenenv.data.labels import class_names
from tokenenv.game.episode import Episode
from tokenenv.game.policy import Method
from tokenenv.game.render import TokenRow, save_token_pictures, to_pixels
from tokenenv.vit.backbone import Backbone

PICTURE = "tokens.png"
"""Its name in a run folder."""


def spread(source: ImageSource, count: int) -> Tensor:
    """Positions of ``count`` images, or of all if there are fewer, evenly over the source."""
    return torch.linspace(0, len(source) - 1, min(count, len(source))).round().long()


@torch.inference_mode()
def write_token_pictures(
    path: Path, backbone: Backbone, policy: Method, source: ImageSource, count: int = 6
) -> None:
    """Draw which tokens the policy keeps or merges, for ``count`` images spread over the source.

    Args:
        path: the PNG to write; no file is written if none of the images can be read.
        backbone: the model.
        policy: the policy, decided deterministically.
        source: the images.
        count: number of images.
    """
    batch = source.batch(spread(source, count))
    if not len(batch.index):
        return
    images = batch.images.to(backbone.device, backbone.dtype)
    dense = backbone(images).argmax(1)
    episode = Episode(backbone, policy.reduction, images, execution="masked")
    sources = []
    while not episode.done:
        episode.act(policy.next_action(episode))
        sources.append(episode.tokens.owners)
    assert episode.logits is not None
    owners = torch.stack(sources, 1).cpu().numpy()
    names = class_names(backbone.model)
    rows = [
        TokenRow(
            pixels=to_pixels(image, backbone.model),
            source=owners[i],
            label=names(int(batch.labels[i])),
            dense=names(int(dense[i])),
            reduced=names(int(episode.logits[i].argmax())),
        )
        for i, image in enumerate(batch.images)
    ]
    merging = episode.tokens.merged
    save_token_pictures(path, rows, backbone.grid, policy.reduction.blocks, merging=merging)
