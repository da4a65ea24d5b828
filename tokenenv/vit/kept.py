"""Tensors that depend on few numbers are made once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def kept(make: Callable[..., T], *arguments: Hashable) -> T:
    """``make(*arguments)``, which was kept if it was made before.

    Nothing may write into its tensors. The least recently used of 1,024 results is dropped.
    """
    if torch.compiler.is_compiling():  # tensors made while torch traces must not be cached
        return make(*arguments)
    made: T = _once(make, *arguments)
    return made


@lru_cache(maxsize=1024)
def _once(make: Callable[..., Any], *arguments: Hashable) -> Any:
    with torch.inference_mode(False):  # autograd can't save tensors made in that mode
        return make(*arguments)
