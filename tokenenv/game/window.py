"""A window that shows an environment's frames, where there is a display."""

from __future__ import annotations

from typing import Any

from tokenenv.game.render import Pixels


class Window:
    """A window of matplotlib's.

    Args:
        title: what it is called.

    Raises:
        RuntimeError: there is no display, or matplotlib finds no toolkit for windows; the message
            is the reason.
    """

    def __init__(self, title: str) -> None:
        import matplotlib
        from matplotlib import pyplot
        from matplotlib.backends import BackendFilter, backend_registry

        backend = matplotlib.get_backend()  # looks for a display
        known = backend_registry.list_builtin(BackendFilter.INTERACTIVE)
        if backend.lower() not in known:
            raise RuntimeError(
                f"matplotlib draws with '{backend}', which has no windows: start it where there is "
                "a display, with a toolkit such as PyQt6 or tkinter"
            )
        pyplot.ion()
        self._figure: Any = pyplot.figure(num=title, layout="tight")
        self._axes = self._figure.add_subplot()
        self._axes.set_axis_off()
        self._image: Any = None

    def show(self, frame: Pixels) -> None:
        """Show a frame ``(H, W, 3)``, all of one size."""
        if self._image is None:
            height, width = frame.shape[:2]
            self._figure.set_size_inches(width / 100, height / 100)
            self._image = self._axes.imshow(frame)
            self._figure.show()
        self._image.set_data(frame)
        self._figure.canvas.draw_idle()
        self._figure.canvas.flush_events()
