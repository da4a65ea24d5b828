"""Methods, which reduce the tokens of a model, and policies, methods that act in games."""

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

    Evaluation, measurement and compression take any method. A subclass may also be an
    ``nn.Module``; its parameters are then saved and moved to a device with it.

    Attributes:
        trained_on: timm's name of the model that it was trained on; empty if any model fits.
        threshold: the probability from which it acts, or None if it uses no such threshold.
    """

    trained_on: str = ""
    threshold: float | None = None

    @property
    def adjustable(self) -> bool:
        """Whether :attr:`threshold` can be set to another value."""
        return self.threshold is not None

    @property
    def reduction(self) -> Reduction:
        """In which blocks tokens are removed, and how."""
        raise NotImplementedError

    def next_action(self, episode: Episode) -> Tensor | None:
        """The action for the decision that is due; None for a method without agents."""
        raise NotImplementedError

    def left(self, backbone: Backbone, step: int, visual: int) -> int | None:
        """Number of visual tokens that are left of ``visual`` after decision ``step``.

        None if that depends on the image. Known numbers spare waiting for the device, and give all
        batches the same shapes.
        """
        return None

    def calibrated(self, backbone: Backbone) -> Method:
        """The method with the numbers that it has to measure on a model first.

        The method itself if there are none.

        Raises:
            UserError: they can't be measured.
        """
        return self

    def decision_macs(
        self, backbone: Backbone, block: int, before: Tensor, after: Tensor
    ) -> Tensor:
        """Multiply-adds of one decision, including what it reads.

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
        """Check that the method can run on a model.

        Args:
            backbone: the model.
            name: its timm name; empty if it has none.

        Raises:
            UserError: it was trained for another model, or its reduction doesn't fit.
        """
        self.check_model(name)
        self.reduction.check(backbone)

    def check_model(self, name: str) -> None:
        """Raise :class:`UserError` if it was trained for another model than timm's ``name``."""
        # Some policies could run on another model, but results would be misleading.
        trained_on = self.trained_on
        if trained_on and name and trained_on.split(".")[0] != name.split(".")[0]:
            raise UserError(
                f"the policy was trained on model '{trained_on}', not on '{name}': take that "
                "model, or train one for this model"
            )

    def on(self: M, device: torch.device) -> M:
        """The method itself, its parameters (if any) moved to ``device`` and in eval mode."""
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
    """Chooses the actions of all agents of a batch of images at once.

    Attributes:
        rules: the rules of the game that it plays.
        soft: whether it has :meth:`soft_play`, and so can be trained by gradient.
    """

    rules: Rules
    soft: bool = False

    def act(self, observation: Observation) -> Tensor:
        """``(B, A)`` int64 actions, in the current order of the tokens."""
        raise NotImplementedError

    def chances(self, observation: Observation) -> Tensor | None:
        """Probability with which each agent chooses to remove something, for pictures.

        Returns:
            ``(B, A)`` in the order of :meth:`act`, or ``(B, 1)`` where one agent decides first
            whether anything is removed; None if the policy decides without probabilities.
        """
        return None

    def macs(self, agents: Tensor, removed: Tensor) -> Tensor:
        """Multiply-adds of computing the actions of one decision.

        Args:
            agents: ``(B,)`` float64 number of agents that acted.
            removed: ``(B,)`` number of tokens that the decision removed.

        Returns:
            ``(B,)``.
        """
        return torch.zeros_like(agents)

    def soft_play(self, backbone: Backbone, images: Tensor) -> tuple[Tokens, Tensor, Tensor]:
        """Run ``images (B, C, H, W)`` with sampled, differentiable decisions.

        Returns:
            All tokens after the last block; ``(B, V)`` 1 for the visual tokens that are kept, 0
            for the others; a scalar that the decisions add to the loss.
        """
        raise NotImplementedError

    @property
    def reduction(self) -> Rules:
        """The policy's rules."""
        return self.rules

    def next_action(self, episode: Episode) -> Tensor:
        """The actions that :meth:`act` chooses for the current observation."""
        return self.act(episode.observe())

    def decision_macs(
        self, backbone: Backbone, block: int, before: Tensor, after: Tensor
    ) -> Tensor:
        """Multiply-adds of the observation and of :meth:`macs`; arguments as for a method."""
        agents = self.rules.deciders(before - backbone.prefix)
        own = self.macs(agents, before - after)
        return own + super().decision_macs(backbone, block, before, after)


class DuckPolicy(Policy):
    """Any object with ``rules`` and ``act`` as a policy; :func:`as_method` makes one.

    Args:
        policy: the object. To have its cost counted it needs :meth:`macs`, too, and to be written
            to disk ``save(path)``.
    """

    def __init__(self, policy: Any) -> None:
        self.policy, self.rules = policy, policy.rules
        self.trained_on = getattr(policy, "trained_on", "")

    def act(self, observation: Observation) -> Tensor:
        """The object's actions ``(B, A)``."""
        return self.policy.act(observation)

    def macs(self, agents: Tensor, removed: Tensor) -> Tensor:
        """The object's multiply-adds.

        Raises:
            UserError: it has no ``macs``.
        """
        return self._own("macs(agents, removed)")(agents, removed)

    def config(self) -> dict[str, Any]:
        """Empty, since the object writes its own config.

        Raises:
            UserError: it has no ``save``.
        """
        self._own("save(path)")
        return {}

    def save(self, path: Path) -> None:
        """Write the object with its own ``save``.

        Raises:
            UserError: it has none.
        """
        self._own("save(path)")(path)

    def _own(self, method: str) -> Callable[..., Any]:
        found = getattr(self.policy, method.partition("(")[0], None)
        if found is None:
            kind = type(self.policy).__name__
            raise UserError(f"a policy of class {kind} has no {method}: add one, or take another")
        return found


def as_method(what: Any) -> Method:
    """A method as it is, or an object with ``rules`` and ``act`` wrapped as one.

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
    backbone: Backbone,
    method: Method,
    images: Tensor,
    execution: Execution | None = None,
    *,
    only_logits: bool = False,
    after_block: Callable[[int, Tokens], object] | None = None,
    visual: int | None = None,
) -> Episode:
    """Run ``images (B, C, H, W)`` to their logits with the tokens reduced by ``method``.

    Decisions are computed in float32, also under autocast, and without gradient. If the method
    makes the images smaller, the episode's ``backbone`` is the model for the smaller images.
    ``only_logits``, ``after_block``: see :class:`~tokenenv.game.episode.Episode`. ``visual``:
    number of visual tokens that ``backbone.embed`` gives; None: one for each patch.
    """
    backbone, images = method.reduction.resize(backbone, images)
    execution = execution or default_execution(backbone.device)
    known, reduction = lengths_known(backbone, method), method.reduction
    episode = Episode(
        backbone,
        reduction,
        images,
        execution=execution,
        only_logits=only_logits,
        known=known,
        after_block=after_block,
    )
    # Patches are those of the images given, of whatever size.
    left: int | None = episode.tokens.patches if visual is None else visual
    while not episode.done:
        before = left
        left = None if left is None else method.left(backbone, episode.step, left)
        if only_logits and left is not None and left == before and not reduction.reorders:
            episode.skip()
            continue
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            action = method.next_action(episode)
        episode.act(action, left)
    return episode


def lengths_known(backbone: Backbone, method: Method) -> bool:
    """Whether all token counts are known before the images are, see :meth:`Method.left`."""
    visual = backbone.patches
    for step in range(len(method.reduction.blocks)):
        left = method.left(backbone, step, visual)
        if left is None:
            return False
        visual = left
    return True
