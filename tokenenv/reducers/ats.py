"""ATS: keeps tokens sampled by significance, a different number for each image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tokenenv.reducers.base import Reducer, check_numbers
from tokenenv.vit import attention, reduction
from tokenenv.vit.backbone import Context
from tokenenv.vit.tokens import Tokens


@dataclass(frozen=True)
class ATS(Reducer):
    """Adaptive token sampling (Fayyaz et al., ECCV 2022), without training.

    A visual token's significance is the class token's attention to it times the norm of its value,
    normalised to sum to one (section 3.1; attention is the mean over the heads and a value is that
    of all heads together, as in the published code). The cumulative sum over the tokens is a
    distribution function, which is inverted at K quantiles, 1/2K, 3/2K, ..., (2K - 1)/2K (section
    3.2). A token that is sampled several times is kept once, so images whose significance is
    concentrated in few tokens keep few.

    The published code sorts the tokens by significance before the sum; the paper's equations, and
    this class, don't. The paper computes the attention rows of the sampled tokens only; here all
    rows are computed, and counted in the cost.

    Attributes:
        blocks: indices of the blocks where tokens are pruned, strictly increasing.
        tokens: K in each of these blocks, the largest number of visual tokens that an image keeps.

    Raises:
        UserError: a value is out of range, or there is not one K per block.
    """

    blocks: tuple[int, ...] = (3, 6, 9)
    tokens: tuple[int, ...] = (108, 80, 60)
    reads: ClassVar[tuple[str, ...]] = ("cls_attention", "value_norms")
    required: ClassVar[tuple[str, ...]] = ("tokens",)
    traces = False
    usage: ClassVar[str] = (
        "ats:tokens=100[,blocks=3/6/9]: at most 100 stay, sampled by significance (ATS); "
        "tokens=100/80/60 block by block"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers("tokens", self.tokens, self.blocks, least=1)

    def reduce(self, tokens: Tokens, context: Context, step: int) -> Tokens:
        """Keep the sampled tokens."""
        assert context.cls_attention is not None and context.value_norms is not None
        significance = context.cls_attention * context.value_norms * tokens.alive
        # Float64: in float32 the rounding of a sum of hundreds could change the quantiles.
        running = significance[:, tokens.prefix :].double().cumsum(1)
        count, device = self.tokens[step], running.device
        quantile = (torch.arange(count, device=device, dtype=torch.float64) + 0.5) / count
        # The first token at which the sum reaches the quantile: never a removed one, which adds 0.
        wanted = quantile * running[:, -1, None]
        if attention.exporting():  # ONNX has no searchsorted
            drawn = (running[:, None] < wanted[..., None]).sum(2)
        else:
            drawn = torch.searchsorted(running, wanted)
        drawn = drawn.clamp(max=running.shape[1] - 1)
        stays = torch.zeros_like(tokens.visual_alive).scatter(1, drawn, True)
        return reduction.prune(tokens, stays)
