"""Methods, which reduce the tokens of a model, and policies, the methods that play games."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tokenenv.errors import UserError
from tokenenv.game.episode import Episode, Execution, default_execution
from tokenenv.game.reduction import Reduction
from tokenenv.game.rules.base import Rules
from tokenenv.game.rules.observation import Observation
from tokenenv.game.stored import with_origin
from tokenenv.storage import write_tensors
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.tokens import Tokens

M = TypeVar("M", bound="Method")


class Method:
    """Reduces the tokens of a model: a :class:`Policy`, or a :class:`~tokenenv.reducers.Reducer`.

    What runs, measures and compresses a model takes any method. A subclass may also be an
    ``nn.Module``; its parameters are then saved with it and follow it to its device.

    Attributes:
        trained_on: timm's name of the model that it was trained on; empty where any will do.
        threshold: the probability by which it decides, where it does so; else None.
    """

    trained_on: str = ""
    threshold: float | None = None

    @property
    def adjustable(self) -> bool:
        """Whether :attr:`threshold` can be set to another value."""
        return self.threshold is not None

    @property
    def reduction(self) -> Reduction:
        """Where tokens go, and how."""
        raise NotImplementedError

    def next_action(self, episode: Episode) -> Tensor | None:
        """The action for the decision that is due; None where nothing is decided."""
        raise NotImplementedError

    def decision_macs(
        self, backbone: Backbone, block: int, before: Tensor, after: Tensor
    ) -> Tensor:
        """Multiply-adds of one decision, all that it reads and computes.

        Args:
            backbone: the model.
            block: the decision's block.
            before: ``(B,)`` float64 tokens before the decision, prefix included.
            after: ``(B,)`` tokens after it.

        Returns:
            ``(B,)``.
        """
        return self.reduction.macs(backbone, block, before)

    def check_fit(self, backbone: Backbone, name: str) -> None:
        """See that the method belongs to a model.

        Args:
            backbone: the model.
            name: its timm name; empty where it has none.

        Raises:
            UserError: it was trained for another model, or its reduction doesn't fit.
        """
        # Some policies could read another model's tokens; numbers of one would mislead here.
        trained_on = self.trained_on
        if trained_on and name and trained_on.split(".")[0] != name.split(".")[0]:
            raise UserError(
                f"the policy was trained on model '{trained_on}', not on '{name}': take that "
                "model, or train one for this model"
            )
        self.reduction.check(backbone)

    def on(self: M, device: torch.device) -> M:
        """Itself, with its parameters, if it has any, on ``device`` and in eval mode."""
        if isinstance(self, nn.Module):
            self.to(device).eval()
        return self

    def config(self) -> dict[str, Any]:
        """Everything but the parameters, as JSON, for :meth:`save`."""
        raise UserError(f"{type(self).__name__} can't be saved: give it a config()")

    def save(self, path: Path) -> None:
        """Write config and parameters into one safetensors file, atomically.

        Raises:
            UserError: the method has no config, or the file can't be written.
        """
        tensors = dict(self.state_dict()) if isinstance(self, nn.Module) else {}
        write_tensors(path, tensors, {**self.config(), **with_origin(type(self))})


class Policy(Method):
    """Decides for all agents of a batch of images at once.

    Attributes:
        rules: what it decides under.
        soft: whether it has :meth:`soft_play`, and so can be trained by gradient.
    """

    rules: Rules
    soft: bool = False

    def act(self, observation: Observation) -> Tensor:
        """``(B, A)`` int64 actions, as the tokens lie."""
        raise NotImplementedError

    def macs(self, agents: Tensor, removed: Tensor) -> Tensor:
        """Multiply-adds of one decision of ``agents`` agents that removed so many tokens."""
        return torch.zeros_like(agents)

    def soft_play(self, backbone: Backbone, images: Tensor) -> tuple[Tokens, Tensor, Tensor]:
        """Run ``images (B, C, H, W)`` with decisions that are drawn and have a gradient.

        Returns:
            The tokens after the last block, all of them; ``(B, V)`` 1 for the visual ones that
            are kept; what the decisions add to the loss.
        """
        raise NotImplementedError

    @property
    def reduction(self) -> Rules:
        """The rules."""
        return self.rules

    def next_action(self, episode: Episode) -> Tensor:
        """What :meth:`act` says of what the agents see."""
        return self.act(episode.observe())

    def decision_macs(
        self, backbone: Backbone, block: int, before: Tensor, after: Tensor
    ) -> Tensor:
        """Those of the observation and of :meth:`macs`."""
        agents = self.rules.deciders(before - backbone.prefix)
        own = self.macs(agents, before - after)
        return own + super().decision_macs(backbone, block, before, after)


class DuckPolicy(Policy):
    """Any object with ``rules`` and ``act`` as a policy; :func:`as_method` makes one.

    Args:
        policy: the object. Where its cost is asked for it needs :meth:`macs` too, and where it is
            written to disk ``save(path)``.
    """

    def __init__(self, policy: Any) -> None:
        self.policy, self.rules = policy, policy.rules
        self.trained_on = getattr(policy, "trained_on", "")

    def act(self, observation: Observation) -> Tensor:
        """As the object."""
        return self.policy.act(observation)

    def macs(self, agents: Tensor, removed: Tensor) -> Tensor:
        """As the object."""
        return self._own("macs(agents, removed)")(agents, removed)

    def config(self) -> dict[str, Any]:
        """Only the object knows: see that it can be saved."""
        self._own("save(path)")
        return {}

    def save(self, path: Path) -> None:
        """As the object."""
        self._own("save(path)")(path)

    def _own(self, method: str) -> Callable[..., Any]:
        found = getattr(self.policy, method.partition("(")[0], None)
        if found is None:
            kind = type(self.policy).__name__
            raise UserError(f"a policy of class {kind} has no {method}: add one, or take another")
        return found


def as_method(what: Any) -> Method:
    """A method itself, or an object with ``rules`` and ``act`` as one.

    Raises:
        UserError: it is neither.
    """
    if isinstance(what, Method):
        return what
    rules = getattr(what, "rules", None)
    if isinstance(rules, Rules) and hasattr(what, "act"):
        return DuckPolicy(what)
    raise UserError(
        f"{what!r:.80} is no policy: give agents.load(RUN), agents.parse_policy('tome:r=8', depth) "
        "for what the command line calls tome:r=8, or a subclass of tokenenv.Policy or of "
        "tokenenv.reducers.Reducer"
    )


def play(
    backbone: Backbone, method: Method, images: Tensor, execution: Execution | None = None
) -> Episode:
    """Run ``images (B, C, H, W)`` to their logits with ``method`` deciding.

    Decisions are taken in float32, also under autocast, and have no gradient. Where the method
    makes the images smaller, the episode's ``backbone`` is the model for smaller images.
    """
    backbone, images = method.reduction.resize(backbone, images)
    execution = execution or default_execution(backbone.device)
    episode = Episode.start(backbone, method.reduction, images, execution=execution)
    while not episode.done:
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            action = method.next_action(episode)
        episode.act(action)
    return episode
