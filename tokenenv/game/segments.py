"""A pass compiled in segments, one from each decision to the next, where lengths are not known."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenenv.game.episode import Episode
from tokenenv.game.policy import Method, play
from tokenenv.vit import packing
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.tokens import Tokens

# Reaching torch's limit of graphs per function is no TorchDynamoException.
_FAILURES = (
    torch._dynamo.exc.TorchDynamoException,
    torch._dynamo.exc.FailOnRecompileLimitHit,
)


class State(NamedTuple):
    """Images between two segments, after a decision whose removed tokens are not cut out yet.

    Attributes:
        x: ``(B, N, D)`` embeddings.
        size: ``(B, N)`` patches that each token stands for.
        alive: ``(B, N)`` bool, which tokens are kept.
        source: ``(B, P)`` the token that stands for each patch; None where nothing reads it.
        counts: ``(steps + 1, B)`` visual tokens before the first decision and after each one.
        merged: whether a token can stand for several patches.
    """

    x: Tensor
    size: Tensor
    alive: Tensor
    source: Tensor | None
    counts: Tensor
    merged: bool


class Segments:
    """The logits of a method on a backbone, by graphs that ``torch.compile`` makes.

    A graph cuts out the tokens that the last decision removed, runs the model to the next decision
    and takes it. Between two graphs the host reads how many tokens the longest image has left: no
    graph knows that number before, and each takes any number. Logits are those of
    :func:`~tokenenv.game.policy.play` with padded execution, but for rounding.

    The first call compiles, some seconds for each decision; a decision that first removes nothing
    of the longest image is compiled again. A method that torch can't compile, such as one that
    draws from a generator of its own, runs as it is after one warning; so does every method where
    there is no C++ compiler, or once torch has reached its limit of graphs.

    Args:
        backbone: the model, in ``eval`` mode. Its layers must not be replaced or converted.
        method: what reduces its tokens, checked to fit it.

    Attributes:
        backbone, method: as given.
    """

    def __init__(self, backbone: Backbone, method: Method) -> None:
        self.backbone, self.method = backbone, method
        self._graphs: list[Callable[..., Any]] = []
        self._compiles = True

    def __getstate__(self) -> dict[str, Any]:
        """Without the graphs, which can't be copied."""
        return {**self.__dict__, "_graphs": []}

    def __call__(self, images: Tensor) -> Tensor:
        """``(B, C, H, W)`` normalised images -> ``(B, classes)`` logits."""
        self.backbone.warn_of_unheard()
        if self._compiles and not self.backbone.watched:
            try:
                return self._compiled(images)
            except _FAILURES as error:
                self._compiles = False
                reason = str(error).strip().partition("\n")[0]
                warnings.warn(
                    f"{type(self.method).__name__} can't be compiled and runs as it is ({reason})",
                    stacklevel=2,
                )
        logits = play(self.backbone, self.method, images, only_logits=True).logits
        assert logits is not None
        return logits

    def _compiled(self, images: Tensor) -> Tensor:
        backbone, images = self.method.reduction.resize(self.backbone, images)
        if not self._graphs and len(images) > 1:
            torch._dynamo.maybe_mark_dynamic(images, 0)
        state, step = self._graph(0)(backbone, self.method, images), 1
        while not isinstance(state, Tensor):
            left = int(state.counts[-1].max()) + backbone.prefix
            room = state.alive[:, :left]
            if step == len(self._graphs):
                _let_vary(state, room)
            state = self._graph(step)(backbone, self.method, *state, room)
            step += 1
        return state

    def _graph(self, step: int) -> Callable[..., Any]:
        if step == len(self._graphs):
            function = _later if step else _first
            # A copy for each step: torch limits the number of graphs that it makes of one function.
            copy = FunctionType(function.__code__.replace(), function.__globals__)
            options: Any = {"guard_filter_fn": _of_inputs} if _CHOOSES else None  # torch empties it
            self._graphs.append(torch.compile(copy, fullgraph=True, options=options))
        return self._graphs[step]


def _let_vary(state: State, room: Tensor) -> None:
    """Make torch's first graph take any number of images (one is apart) and of tokens."""
    batch, tokens = (0,) * (len(room) > 1), (1,)
    for each in (state.x, state.size, state.alive, room):
        torch._dynamo.maybe_mark_dynamic(each, [*batch, *tokens])
    torch._dynamo.maybe_mark_dynamic(state.counts, [d + 1 for d in batch])
    if state.source is not None:
        torch._dynamo.maybe_mark_dynamic(state.source, list(batch))


def _first(backbone: Backbone, method: Method, images: Tensor) -> State | Tensor:
    """From the images to the first decision."""
    reduction = method.reduction
    return _decided(
        Episode(backbone, reduction, images, execution="padded", only_logits=True), method
    )


def _later(
    backbone: Backbone,
    method: Method,
    x: Tensor,
    size: Tensor,
    alive: Tensor,
    source: Tensor | None,
    counts: Tensor,
    merged: bool,
    room: Tensor,
) -> State | Tensor:
    """From the removal of tokens to the next decision, or to the logits.

    ``room``: ``(B, left)`` tells by its shape how many tokens to leave; torch would make a graph
    for every number given as such.
    """
    tokens = Tokens(
        x, size, alive, source, backbone.patches, backbone.prefix,
        keep_one=not backbone.reads_prefix or backbone.prefix == 0, ragged=True, moved=True,
        merged=merged,
    )  # fmt: skip
    tokens = packing.cut(tokens, packing.kept_first(tokens), room.shape[1], ragged=len(x) > 1)
    episode = Episode.resumed(backbone, method.reduction, tokens, tuple(counts.unbind(0)))
    return _decided(episode, method)


def _decided(episode: Episode, method: Method) -> State | Tensor:
    """The images after the decision that is due, or their logits."""
    if episode.logits is not None:
        return episode.logits
    tokens = method.reduction.apply(episode.moment, method.next_action(episode))
    counts = torch.stack([*episode.counts, tokens.counts() - tokens.prefix])
    return State(tokens.x, tokens.size, tokens.alive, tokens.source, counts, tokens.merged)


def _of_inputs(guards: Any) -> list[bool]:
    """Which conditions torch checks before it reuses a graph: those of tensors and of numbers.

    Model, method and the package's own functions don't change, and checking all their attributes
    takes longer than a decision.
    """
    fixed = ("backbone", "method", "G[")
    return [not (each.is_global or any(name in each.name for name in fixed)) for each in guards]


_CHOOSES = hasattr(torch.compiler, "skip_all_guards_unsafe")
"""Whether torch lets conditions be chosen, as it does since 2.8."""
