"""Pages read back, and pages full of names that look like scripts."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


class Read(HTMLParser):
    """The elements of a page, and the text of the element with the id ``data``."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.data = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][1].get("id") == "data":
            self.data += data


def spoiled(page: dict[str, Any]) -> dict[str, Any]:
    """The page with a name that would run a script, wherever a name can be."""
    images = [{**image, "file": EVIL} for image in page["images"]]
    methods = [{**method, "what": EVIL} for method in page["methods"]]
    names = dict.fromkeys(page["names"], EVIL)
    return {**page, "title": EVIL, "note": EVIL} | {
        "images": images, "methods": methods, "names": names,
    }  # fmt: skip
