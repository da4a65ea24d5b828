"""What the environments show of an image: a frame, text, a window."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokenenv.data.labels import class_names
from tokenenv.game import Game, render
from tokenenv.game.animation import captioned, guesses
from tokenenv.game.render import Pixels
from tokenenv.game.window import Window


@torch.no_grad()
def frame(game: Game, sources: Sequence[Tensor], total: Tensor, row: int) -> Pixels:
    """Image ``row`` after each decision so far, and what the models see in it.

    Below the tokens stand the true class, the reward so far, summed over agents, and the most
    probable classes of the dense model and of the model that goes on with the tokens left and
    removes no further one. All frames of an episode have one size.

    Args:
        game: within an episode, or after its end.
        sources: after each decision ``(B, P)`` the token that stands for each patch, -1 if pruned.
        total: ``(B,)`` rewards so far.
        row: which image of the batch.
    """
    names, episode = class_names(game.backbone.model), game.episode
    assert episode is not None
    left = episode.finish(torch.tensor([row], device=game.backbone.device))[0]
    known = [
        (title, guesses(logits.float().softmax(0).cpu().numpy(), names))
        for title, logits in (("dense model", game.dense[row]), ("with the tokens left", left))
    ]
    label = names(int(game.labels[row]))
    line = f"true class: {label}   reward so far: {float(total[row]) + 0.0:.3f}"
    return captioned(render.token_picture(*_tokens(game, sources, row)), line, known)


def words(game: Game, sources: Sequence[Tensor], row: int) -> str:
    """The tokens of image ``row`` as text; arguments as for :func:`frame`."""
    return render.token_text(*_tokens(game, sources, row))


def _tokens(
    game: Game, sources: Sequence[Tensor], row: int
) -> tuple[Pixels, NDArray[np.bool_], tuple[int, int], Sequence[int], NDArray[np.int64] | None]:
    source = np.zeros((0, game.backbone.patches), dtype=np.int64)
    if sources:
        source = torch.stack([after[row] for after in sources]).cpu().numpy()
    pixels = render.to_pixels(game.images[row], game.backbone.model)
    merged = source if game.rules.merges else None
    return pixels, source >= 0, game.backbone.grid, game.rules.blocks, merged


class Screen:
    """Where ``render_mode="human"`` shows frames: a window, or else text and the reason."""

    def __init__(self) -> None:
        self._window: Window | None = None
        self._tried = False

    def show(self, game: Game, sources: Sequence[Tensor], total: Tensor, row: int) -> None:
        """Show image ``row``, of a batch the first one only in a window; as for :func:`frame`."""
        if not self._tried:
            self._tried = True
            try:
                self._window = Window("tokenenv")
            except (ImportError, RuntimeError) as error:
                print(f"no window ({error}), so this is text:")
        if self._window is None:
            print(words(game, sources, row))
        elif row == 0:
            self._window.show(frame(game, sources, total, row))
