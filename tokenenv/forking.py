"""What a forked process needs before torch can compute in it."""

from __future__ import annotations

import os
import sys


def one_thread_in_forked_children() -> None:
    """Let every process forked from now on compute with one thread of torch.

    A fork copies the memory of OpenMP's threads but not the threads: where the parent has computed
    with several, the child would wait for them forever at its first large operation. With one it
    starts none. (torch's own data-loading workers do the same.) What was forked before this
    package was imported, and a GPU that the parent has used, need ``spawn`` or ``forkserver``.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_one_thread)


def _one_thread() -> None:
    torch = sys.modules.get("torch")  # never a reason to load it
    if torch is not None:
        torch.set_num_threads(1)
