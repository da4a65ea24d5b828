"""Episodes to watch: what each decision leaves of an image, and what the model still sees in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from tokenenv.data import ImageSource
from tokenenv.data.labels import class_names
from tokenenv.errors import UserError
from tokenenv.game.animation import Guess, Panel, draw_frame, save_gif
from tokenenv.game.cost import Cost
from tokenenv.game.episode import Episode
from tokenenv.game.policy import Method
from tokenenv.game.render import Pixels, to_pixels
from tokenenv.measure.token_pictures import spread
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.dense import Dense

BEFORE_AFTER = "before_after.gif"
"""Name of the animation in a run folder."""

_GUESSES = 3


def check_watchable(what: str, method: Method) -> None:
    """Raise :class:`UserError` if the method takes no decisions about tokens."""
    if not method.reduction.blocks:
        raise UserError(
            f"'{what}' takes no decisions about tokens, so there is nothing to watch: take a "
            "method with blocks, such as evit:keep=0.7 or tome:r=8"
        )


@torch.inference_mode()
def episode_frames(
    backbone: Backbone,
    dense: Dense,
    methods: Mapping[str, Method],
    source: ImageSource,
    index: Tensor,
) -> list[list[Pixels]]:
    """Play methods deterministically on some images and draw each decision.

    Args:
        backbone: the model that the methods run on.
        dense: the dense model, whose classes are shown beside.
        methods: by the title of their panels, which stand beside each other; all decide in as many
            blocks.
        source: the images.
        index: ``(B,)`` which of them.

    Returns:
        For each image that can be read, its frames ``(H, W, 3)``: before the first decision, and
        after each one.
    """
    batch = source.batch(index)
    if not len(batch.index):
        return []
    images = batch.images.to(backbone.device, backbone.dtype)
    names = class_names(backbone.model)
    heads = [
        f"image {position}, true class: {names(label)}"
        for position, label in zip(batch.index.tolist(), batch.labels.tolist(), strict=True)
    ]
    pixels = [to_pixels(image, dense.model) for image in batch.images]
    known = _guesses(dense(images.to(dense.device, dense.dtype)), class_names(dense.model))
    columns = []
    for title, method in methods.items():
        steps = _play(backbone, method, images)
        column = [
            [
                Panel((title, heads[i]), pixels[i], owner[i], merging, feet[i],
                      (("dense model", known[i]), ("with the tokens left", guesses[i])))
                for owner, merging, feet, guesses in steps
            ]
            for i in range(len(pixels))
        ]  # fmt: skip
        columns.append(column)
    return [
        [draw_frame(panels, backbone.grid) for panels in zip(*of_image, strict=True)]
        for of_image in zip(*columns, strict=True)
    ]


def _play(backbone: Backbone, method: Method, images: Tensor) -> list[tuple]:
    """For each step: owners ``(B, P)``, whether tokens are merged, lines and guesses per image."""
    cost, names = Cost(backbone), class_names(backbone.model)
    blocks = method.reduction.blocks
    episode = Episode(backbone, method.reduction, images, execution="masked")
    everyone = torch.arange(len(images), device=images.device)
    owners, merged, feet, guesses = [], [], [], []
    while True:
        step = episode.step
        when = "before the first decision"
        if step:
            where = "in" if method.reduction.between else "before"
            when = f"decision {step} of {len(blocks)}, {where} block {blocks[step - 1]}"
        left, saved = episode.counts[-1].tolist(), _saved(episode, method, cost).tolist()
        feet.append(
            [
                (when, f"{n} of {backbone.patches} tokens left",
                 f"{percent:.1f} % of the multiply-adds saved so far")
                for n, percent in zip(left, saved, strict=True)
            ]
        )  # fmt: skip
        owners.append(episode.tokens.owners.cpu().numpy())
        merged.append(episode.tokens.merged)
        guesses.append(_guesses(episode.finish(everyone), names))
        if episode.done:
            break
        episode.act(method.next_action(episode))
    merging = [any(merged)] * len(merged)
    return list(zip(owners, merging, feet, guesses, strict=True))


def _saved(episode: Episode, method: Method, cost: Cost) -> Tensor:
    """``(B,)`` percent of the dense multiply-adds saved if no further decision were taken.

    The decisions taken are counted, too.
    """
    depth, count = episode.backbone.depth, episode.counts[-1] + episode.backbone.prefix
    attended = episode.attended + [count] * (depth - len(episode.attended))
    fed = episode.fed + [count] * (depth - len(episode.fed))
    total = cost.backbone_macs(attended, fed)
    total = total + cost.decision_macs(method, attended, fed, episode.step)
    return 100 * (1 - total / cost.dense())


def _guesses(logits: Tensor, names: Callable[[int], str]) -> list[list[Guess]]:
    """The most probable classes of each image."""
    found = logits.float().softmax(1).topk(min(_GUESSES, logits.shape[1]), 1)
    rows = zip(found.indices.tolist(), found.values.tolist(), strict=True)
    return [
        [(names(label), probability) for label, probability in zip(*row, strict=True)]
        for row in rows
    ]


def write_before_after(
    path: Path, backbone: Backbone, before: Method, after: Method, source: ImageSource
) -> None:
    """Write the GIF of an untrained policy (left) and the trained one (right) on three images.

    No file is written if none of the images can be read.
    """
    methods = {"untrained": before, "trained": after}
    episodes = episode_frames(backbone, backbone, methods, source, spread(source, 3))
    if episodes:
        save_gif(path, episodes)
