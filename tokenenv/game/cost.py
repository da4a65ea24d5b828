"""What a forward pass costs, in multiply-adds (1 MAC = 1 FLOP, the field's convention)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tokenenv.game.episode import Episode
from tokenenv.game.policy import Method
from tokenenv.game.reduction import Reduction
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.tokens import Tokens


def measured_macs(run: Callable[[], Any]) -> float:
    """Multiply-adds of matrix products and convolutions that ``run()`` really executes.

    Uses torch's FLOP counter, which counts 2 per multiply-add. In some releases (2.13, 2.14) it
    misses fused attention on a CPU, so attention runs as separate matrix products.
    """
    counter = FlopCounterMode(display=False)
    # The counter does not work with inference tensors.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        run()
    return counter.get_total_flops() / 2


class Costs:
    """What forward passes cost, in one unit.

    Attributes:
        unit: the unit of :meth:`dense` and :meth:`of`.
        word: what is saved.
        saved_words: what a saving is called, behind "12.3 %".
    """

    unit: ClassVar[str]
    word: ClassVar[str]
    saved_words: ClassVar[str]

    def dense(self) -> float:
        """Cost of the dense model for one image."""
        raise NotImplementedError

    def of(self, episode: Episode, method: Method) -> Tensor:
        """``(B,)`` float64 cost of each image of a finished episode, decisions included.

        Args:
            episode: as :func:`~tokenenv.game.policy.play` returned it.
            method: the method that was played.
        """
        raise NotImplementedError


class Cost(Costs):
    """Closed-form multiply-adds per image, for any number of tokens in each block.

    Counted are, per block with n tokens of width d, all linear layers (12 n d^2 for a plain block)
    and the two matrix products of attention (2 n^2 d), and besides the patch embedding and the
    head. Norms, softmax and activations are not counted.

    :meth:`dense` and :meth:`of` count the last block in full, as papers do. Of a model whose head
    reads prefix tokens only, a pass for its logits computes less of that block
    (:meth:`~tokenenv.vit.backbone.Backbone.finish`), whatever the method is:
    :meth:`dense_executed` and :meth:`executed` count that.

    Args:
        backbone: the model.
    """

    unit, word, saved_words = "MACs", "MACs", "fewer MACs"

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        layers = [backbone.family.linear_layers(i) for i in range(backbone.depth)]
        self._attention_linear = [linear_macs(*attention) for attention, _ in layers]
        self._mlp_linear = [linear_macs(*mlp) for _, mlp in layers]
        self._attention = [2 * backbone.attention_dim(i) for i in range(backbone.depth)]
        self._embed, head = self._measure_ends()
        self._head, self._head_slope = head

    def _measure_ends(self) -> tuple[float, tuple[float, float]]:
        """MACs of the patch embedding, and of the head: intercept and slope in the tokens."""
        backbone = self.backbone
        shape = (1, *backbone.image_shape)
        image = torch.zeros(shape, device=backbone.device, dtype=backbone.dtype)
        with torch.no_grad():
            tokens = backbone.embed(image)
        full, half = tokens.x.shape[1], max(tokens.x.shape[1] // 2, backbone.prefix + 1)

        def head(count: int) -> float:
            x = tokens.x[:, :count]
            return measured_macs(lambda: backbone.family.head(x))

        embed = measured_macs(lambda: backbone.embed(image))
        slope = (head(full) - head(half)) / max(full - half, 1)
        return embed, (head(full) - slope * full, slope)

    def backbone_macs(self, attended: Sequence[Tensor], fed: Sequence[Tensor]) -> Tensor:
        """Multiply-adds of each image.

        Args:
            attended: for each block ``(B,)`` tokens in its attention, prefix included.
            fed: for each block ``(B,)`` tokens in its MLP, prefix included.

        Returns:
            ``(B,)`` float64.
        """
        first = attended[0]
        total = first.new_full(first.shape, self._embed + self._head, dtype=torch.float64)
        projections = zip(attended, self._attention_linear, self._attention, strict=True)
        for count, linear, attention in projections:
            n = count.double()
            total += n * linear + n * n * attention
        for count, linear in zip(fed, self._mlp_linear, strict=True):
            total += count.double() * linear
        return total + fed[-1].double() * self._head_slope

    def of(self, episode: Episode, method: Method) -> Tensor:
        """``(B,)`` multiply-adds of each image of a finished episode, decisions included."""
        if episode.backbone is not self.backbone:  # resize runs a copy for smaller images
            return Cost(episode.backbone).of(episode, method)
        total = self.backbone_macs(episode.attended, episode.fed)
        return total + self.decision_macs(method, episode.attended, episode.fed)

    def executed(self, episode: Episode, method: Method) -> Tensor:
        """``(B,)`` :meth:`of`, but of the last block only what a pass for the logits computes.

        A decision in the last block that changes nothing which the head reads is not counted.
        """
        if episode.backbone is not self.backbone:
            return Cost(episode.backbone).executed(episode, method)
        return self.executed_macs(method, episode.attended, episode.fed)

    def executed_macs(
        self, method: Method, attended: Sequence[Tensor], fed: Sequence[Tensor]
    ) -> Tensor:
        """:meth:`executed` from the arguments of :meth:`backbone_macs`."""
        whole = self.backbone_macs(attended, fed)
        blocks, last = method.reduction.blocks, self.backbone.depth - 1
        if not self._shortens(method.reduction):
            return whole + self.decision_macs(method, attended, fed)
        left_out = method.reduction.between and last in blocks
        decisions = len(blocks) - 1 if left_out else None
        spared = self._spared(attended[-1], fed[-1])
        return whole - spared + self.decision_macs(method, attended, fed, decisions)

    def dense_executed(self) -> float:
        """Multiply-adds for one image of the dense model run for its logits alone."""
        count = torch.tensor([self.backbone.prefix + self.backbone.patches])
        spared = float(self._spared(count, count)) if self.backbone.reads_prefix else 0.0
        return self.dense() - spared

    def _shortens(self, reduction: Reduction) -> bool:
        """Whether the last block runs as :meth:`Backbone.finish`; see ``only_logits``."""
        in_it = reduction.between and self.backbone.depth - 1 in reduction.blocks
        return self.backbone.reads_prefix and (reduction.keeps_prefix or not in_it)

    def _spared(self, attended: Tensor, fed: Tensor) -> Tensor:
        """``(B,)`` what :meth:`Backbone.finish` doesn't compute of the last block and the head."""
        n, m = attended.double(), fed.double()
        whole = n * self._attention_linear[-1] + n * n * self._attention[-1]
        whole += m * (self._mlp_linear[-1] + self._head_slope) + self._head
        start, slope = self._finish
        return whole - start - slope * n

    @cached_property
    def _finish(self) -> tuple[float, float]:
        """MACs of :meth:`Backbone.finish`: intercept and slope in the tokens before it."""
        backbone, prefix = self.backbone, self.backbone.prefix

        def macs(count: int) -> float:
            with torch.inference_mode(False):
                x = torch.zeros(
                    1, count, backbone.dim, device=backbone.device, dtype=backbone.dtype
                )
                return measured_macs(lambda: backbone.finish(Tokens.start(x, prefix, trace=False)))

        few, full = prefix + 1, prefix + backbone.patches
        slope = (macs(full) - macs(few)) / max(full - few, 1)
        return macs(full) - slope * full, slope

    def dense(self) -> float:
        """Multiply-adds of the dense model for one image."""
        count = torch.tensor([self.backbone.prefix + self.backbone.patches])
        counts = [count] * self.backbone.depth
        return float(self.backbone_macs(counts, counts))

    def decision_macs(
        self,
        method: Method,
        attended: Sequence[Tensor],
        fed: Sequence[Tensor],
        decisions: int | None = None,
    ) -> Tensor:
        """``(B,)`` multiply-adds of the decisions, including what they read.

        Args:
            method: the policy or reducer.
            attended: as for :meth:`backbone_macs`.
            fed: as for :meth:`backbone_macs`.
            decisions: number of decisions to count, from the first; None: all.
        """
        full = self.backbone.prefix + self.backbone.patches
        reduction = method.reduction
        total = torch.zeros_like(attended[0], dtype=torch.float64)
        for block in reduction.blocks[:decisions]:
            if reduction.between:
                before, after = attended[block], fed[block]
            else:
                after = attended[block]
                before = fed[block - 1] if block else torch.full_like(after, full)
            total += method.decision_macs(self.backbone, block, before.double(), after.double())
        return total


def linear_macs(*parts: nn.Module) -> int:
    """Multiply-adds of all linear layers in some modules, per row of their input."""
    layers = (layer for part in parts for layer in part.modules() if isinstance(layer, nn.Linear))
    return sum(layer.in_features * layer.out_features for layer in layers)
