"""Assemble a page: one HTML file with its style, its scripts and its data."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenenv.storage import write_bytes

_SCRIPTS = ("words.js", "canvas.js", "viewer.js", "gallery.js", "chart.js", "tables.js", "main.js")


def write_page(path: Path, data: dict[str, Any]) -> int:
    """Write a page, atomically; returns its size in bytes.

    Args:
        path: the file.
        data: as the functions of :mod:`tokenenv.page.data` give it.

    Raises:
        UserError: the file can't be written.
    """
    content = page_html(data).encode()
    write_bytes(path, content)
    return len(content)


def page_html(data: dict[str, Any]) -> str:
    """The page as text."""
    parts = {
        "title": html.escape(data["title"]),
        "style": _asset("page.css"),
        "scripts": "\n".join(map(_asset, _SCRIPTS)),
        "data": script_safe(data),
    }
    pieces = _asset("page.html").split("@@")  # text, a part's name, text, ...
    pieces[1::2] = [parts[name] for name in pieces[1::2]]
    return "".join(pieces)


def script_safe(data: dict[str, Any]) -> str:
    """JSON that can't end the ``<script>`` it lies in, or start a comment there."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _asset(name: str) -> str:
    return (files("tokenenv.page") / "assets" / name).read_text(encoding="utf-8")
