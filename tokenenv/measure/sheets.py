"""PNG sheets of recorded episodes, one below the other."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from tokenenv.game.render import Pixels, enlarged, reduced
from tokenenv.game.sheet import Strip, draw_sheet
from tokenenv.measure.episodes import Recorded, Step
from tokenenv.measure.speed import DENSE, Speed
from tokenenv.measure.watching import Seen, guesses


def sheet_png(seen: Seen, speeds: Sequence[Speed]) -> bytes:
    """A PNG with a sheet for each image: block by block what is left under each method.

    Args:
        seen: images and recorded episodes.
        speeds: measured times of the dense model and of the methods, at one batch size.
    """
    times = {speed.what: speed for speed in speeds}
    sheets = [_sheet(seen, image, times) for image in range(len(seen.pixels))]
    width = max(sheet.shape[1] for sheet in sheets)
    filled = [
        np.pad(sheet, ((0, 0), (0, width - sheet.shape[1]), (0, 0)), constant_values=255)
        for sheet in sheets
    ]
    content = io.BytesIO()
    Image.fromarray(np.concatenate(filled)).save(content, "PNG", optimize=True)
    return content.getvalue()


def _sheet(seen: Seen, image: int, times: Mapping[str, Speed]) -> Pixels:
    large = enlarged(seen.pixels[image])
    strips = []
    for what, method in seen.methods.items():
        panels, captions = [large], [("image", f"{len(method.steps[0].owners[image])} tokens")]
        for step in method.steps[1:]:
            owners = step.owners[image]
            panels.append(reduced(large, owners, method.grid, merging=method.merges))
            saved = method.saved(step)[image]
            where = "in" if method.between else "before"
            captions.append(
                (f"{where} block {step.block}", f"{step.tokens[image]} tokens, {saved:.0f} % saved")
            )
        last = method.steps[-1]
        known = guesses(last.probabilities[image], seen.names)
        line = left_in_words(method, last, image, times.get(what), times.get(DENSE))
        strips.append(Strip(what, line, panels, captions, known))
    title = "   ".join(seen.titles[image])
    return draw_sheet(title, guesses(seen.dense[image], seen.names), strips)


def left_in_words(
    method: Recorded, step: Step, image: int, speed: Speed | None, dense: Speed | None
) -> str:
    """How many tokens, multiply-adds and milliseconds are left of the dense model's."""
    rows, columns = method.grid
    words = (
        f"left: {step.tokens[image]} of {rows * columns} tokens; {step.macs[image] / 1e9:.3g} of "
        f"{method.dense_macs / 1e9:.3g} GMACs (1 MAC = 1 FLOP), decisions included"
    )
    if speed is None or dense is None:
        return words
    one, whole = (1e3 / each.images_per_s for each in (speed, dense))
    return f"{words}; {one:.3g} of {whole:.3g} ms per image, measured at batch {speed.batch}"
