"""Hooks of the modules that stages run in parts: a block, its attention, the whole model.

The stages call the layers inside a block, so torch calls those layers' hooks itself. A block, its
attention and the model are never called as a whole, so their hooks are called here. They may look,
not change: what a hook changes, decisions, costs and other executions would leave out.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenenv.errors import UserError


def watched(modules: Iterable[nn.Module | None]) -> bool:
    """Whether one of ``modules``, or a module inside one, has a forward hook or pre-hook."""
    if torch.compiler.is_compiling():
        return False
    for module in modules:
        if module is not None and (
            module._forward_hooks
            or module._forward_pre_hooks
            or watched(module._modules.values())  # None where a module has an empty place
        ):
            return True
    return False


class Watch:
    """Remembers what it found of hooks, until one is registered anywhere."""

    def __init__(self) -> None:
        self._unseen: tuple[int, ...] = ()
        self._heard: tuple[int, ...] = ()

    def warn_of_unheard(self, model: nn.Module, blocks: Iterable[nn.Module]) -> None:
        """Warn of hooks that no stage can call; Python shows the warning once.

        Args:
            model: the model.
            blocks: its transformer blocks.
        """
        now = (RemovableHandle.next_id, *map(id, blocks))
        if now == self._heard:
            return
        if not (_unheard(model) or any(map(_unheard_in_block, blocks))):
            self._heard = now
            return
        warnings.warn(
            "some hooks of this model don't fire, as it runs in stages: those on attn_drop, on "
            "patch_drop and on the container of the blocks, and backward hooks of the model, of "
            "blocks and of their attention; hook other layers, or call the dense model",
            stacklevel=4,
        )

    def sees(self, blocks: Iterable[nn.Module], norm: nn.Module | None) -> bool:
        """Whether one of ``blocks``, the final ``norm``, or a module inside one is watched."""
        now = (RemovableHandle.next_id, *map(id, blocks))
        if now != self._unseen:
            if watched([*blocks, norm]):
                return True
            self._unseen = now
        return False


def entering(module: nn.Module, x: Tensor) -> Tensor | None:
    """Call the forward pre-hooks of ``module`` with its input ``x``.

    Returns:
        ``x`` if :func:`leaving` needs it, so that its memory is free again otherwise.

    Raises:
        UserError: a hook returns another input.
    """
    if torch.compiler.is_compiling():  # hooks of modules inside a graph are torch's matter
        return None
    for key, hook in list(module._forward_pre_hooks.items()):
        if key in module._forward_pre_hooks_with_kwargs:
            told = hook(module, (x,), {})
            told = told[0] if isinstance(told, tuple) and len(told) == 2 else told
        else:
            told = hook(module, (x,))
        if isinstance(told, tuple) and len(told) == 1:
            told = told[0]
        _check_looked(module, told, x, "input")
    return x if module._forward_hooks else None


def leaving(module: nn.Module, given: Tensor | None, x: Tensor) -> None:
    """Call the forward hooks of ``module`` with its output.

    Args:
        module: the module.
        given: what :func:`entering` returned.
        x: the output.

    Raises:
        UserError: a hook returns another output.
    """
    if given is None or torch.compiler.is_compiling():
        return
    for key, hook in list(module._forward_hooks.items()):
        more: tuple[Any, ...] = ({},) if key in module._forward_hooks_with_kwargs else ()
        _check_looked(module, hook(module, (given,), *more, x), x, "output")


def _check_looked(module: nn.Module, told: Any, x: Tensor, what: str) -> None:
    if told is not None and told is not x:
        raise UserError(
            f"a hook on a {type(module).__name__} changes its {what}, and a model that runs in "
            "stages takes no such change: let the hook return None, or put it on a layer inside, "
            "such as a block's mlp"
        )


def _unheard(model: Any) -> bool:
    aside = (getattr(model, "patch_drop", None), getattr(model, "blocks", None))
    return _hears_backward(model) or any(_has_hooks(part) for part in aside)


def _unheard_in_block(block: Any) -> bool:
    attention = getattr(block, "attn", None)
    return (
        _hears_backward(block)
        or _hears_backward(attention)
        or _has_hooks(getattr(attention, "attn_drop", None))
    )


def _hears_backward(module: nn.Module | None) -> bool:
    return module is not None and bool(module._backward_hooks or module._backward_pre_hooks)


def _has_hooks(module: nn.Module | None) -> bool:
    return module is not None and (
        bool(module._forward_hooks or module._forward_pre_hooks) or _hears_backward(module)
    )
