"""What the suite refuses: looks at test images, and policies that depend on the execution."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, get_args

import torch
from torch import Tensor

from tokenenv.errors import UserError
from tokenenv.game.episode import Execution
from tokenenv.game.policy import Method, play

if TYPE_CHECKING:
    from tokenenv.suite.opened import OpenTask

_IMAGES = 32
_APART = 1e-2  # of logits; executions differ by rounding, about 1e-5
_ALLOWED = 2  # images in which rounding may have changed a decision


class HiddenImages:
    """In the place of a task's test images while a learner learns.

    Attributes:
        asked: whether the learner asked for anything of them.
    """

    def __init__(self, task: str) -> None:
        self._task, self.asked = task, False

    def refuse(self) -> NoReturn:
        """Raise the :class:`UserError` that says what the learner did."""
        self.asked = True
        raise UserError(
            f"the learner looks at the test images of '{self._task}', on which it will be "
            "measured: let it learn from task.train"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copies and pickles look for these
            raise AttributeError(name)
        self.refuse()

    def __len__(self) -> int:
        self.refuse()


def check_executions(opened: OpenTask, policy: Method) -> None:
    """Check that a policy acts alike in all executions, on some training images.

    Raises:
        UserError: it does not: it draws at random, or an image depends on its batch.
    """
    images = opened.train.subset(_IMAGES, seed=0).batch(torch.arange(_IMAGES)).images
    images = images.to(opened.backbone.device)
    logits = {name: _logits(opened, policy, images, name) for name in get_args(Execution)}
    first = next(iter(logits))
    for name, found in logits.items():
        apart = int(((logits[first] - found).abs().amax(1) > _APART).sum())
        if apart > _ALLOWED:
            raise UserError(
                f"a policy of the learner does not act alike in different executions: on {apart} "
                f"of {len(found)} training images '{name}' gives other logits than "
                f"'{first}'; let it decide by what it observes of an image alone, without "
                "chance"
            )


def _logits(opened: OpenTask, policy: Method, images: Tensor, execution: Execution) -> Tensor:
    logits = play(opened.backbone, policy, images, execution).logits
    assert logits is not None
    return logits
