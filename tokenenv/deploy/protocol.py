"""What timm's tools, optimisers and users expect of a Vision Transformer, for a compressed one."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenenv.errors import UserError
from tokenenv.game.episode import Episode
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.packing import unpack
from tokenenv.vit.tokens import Tokens


class TimmProtocol(nn.Module):
    """timm's methods and attributes of a model of which tokens leave.

    Names of parameters begin with ``model.``. Tokens are told as :meth:`forward_features` tells
    them, one for each patch.
    """

    model: Any

    @property
    def backbone(self) -> Backbone:
        """The model cut into stages."""
        raise NotImplementedError

    def _play(
        self, x: Tensor, after_block: Callable[[int, Tokens], object] | None = None
    ) -> Episode:
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Number of classes, as of the timm model."""
        return self.model.num_classes

    @property
    def embed_dim(self) -> int:
        """Width of the tokens."""
        return self.model.embed_dim

    @property
    def num_features(self) -> int:
        """Width of what :meth:`forward_features` gives."""
        return self.model.num_features

    @property
    def head_hidden_size(self) -> int:
        """Width of what the classifier reads."""
        return self.model.head_hidden_size

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """That of the timm model, which timm's preprocessing reads."""
        return getattr(self.model, "pretrained_cfg", {})

    @property
    def default_cfg(self) -> dict[str, Any]:
        """Timm's older name of :attr:`pretrained_cfg`."""
        return self.pretrained_cfg

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay."""
        return {f"model.{name}" for name in self.model.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of the parameters of each group, for layer-wise learning rates.

        Args:
            coarse: as timm's model takes it.
        """
        return {
            group: _below_model(patterns)
            for group, patterns in self.model.group_matcher(coarse=coarse).items()
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the activations of blocks anew in the backward pass, which saves memory."""
        self.model.set_grad_checkpointing(enable)

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.model.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model a new classifier, untrained, in place.

        Args:
            num_classes: number of classes, at least 1.
            global_pool: another pooling, in timm's words; None: as before.

        Raises:
            UserError: no classes, or a pooling that the model can't have.
        """
        if num_classes < 1:
            raise UserError(
                f"num_classes={num_classes}: a compressed model has a classifier; for features "
                "call forward_head(forward_features(x), pre_logits=True)"
            )
        if global_pool == "":
            raise UserError("global_pool='': a compressed model pools; choose token, avg or max")
        pooling = {} if global_pool is None else {"global_pool": global_pool}
        try:
            self.model.reset_classifier(num_classes, **pooling)
        except AssertionError as error:
            raise UserError(f"global_pool='{global_pool}': {error}") from None

    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` -> tokens ``(B, prefix + P, D)`` after the final norm.

        One token per patch, in timm's order. A merged patch has the token that it was merged into.
        A pruned one has the mean of the tokens that the head pools, so that :meth:`forward_head`
        returns the logits of the model. If the method makes images smaller, P is the number
        of patches of the smaller image.

        Raises:
            UserError: the model pools by attention, which would read the pruned patches.
        """
        if x.shape[0] == 0:
            return self.model.forward_features(x)
        return self._features(self._play(x).tokens)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens of :meth:`forward_features` -> logits, or what the classifier reads."""
        return self.model.forward_head(x, pre_logits=pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """The tokens after some of the blocks, in the form of timm's method of this name.

        There is one token per patch, see :meth:`forward_features`.

        Args:
            x: images ``(B, C, H, W)``, normalised.
            indices: the blocks; a number: so many last ones; None: all.
            return_prefix_tokens: whether to return the prefix tokens of each block, too.
            norm: whether to apply the final norm to each.
            stop_early: whether the features are those after the last of these blocks. All blocks
                run all the same.
            output_fmt: ``NCHW``: ``(B, D, rows, columns)`` each; ``NLC``: ``(B, P, D)``.
            intermediates_only: whether to leave the features out.
            output_dict: whether to return a dict with timm's keys.

        Returns:
            :meth:`forward_features` of the images and a list; the list; or a dict.

        Raises:
            UserError: an index or a format that there is not; as :meth:`forward_features`, unless
                ``intermediates_only``.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise UserError(f"output_fmt={output_fmt!r}: choose from 'NCHW', 'NLC'")
        backbone = self.backbone
        wanted = _wanted(indices, backbone.depth)
        seen: dict[int, Tokens] = {}

        def after(block: int, tokens: Tokens) -> None:
            if block in wanted:
                seen[block] = tokens

        count, x = len(x), x if len(x) else x.new_zeros(1, *x.shape[1:])
        episode = self._play(x, after)
        prefix, patches = [], []
        for block in sorted(set(wanted)):
            each = self._by_patch(seen[block], norm=norm)[:count]
            prefix.append(each[:, : backbone.prefix])
            patches.append(each[:, backbone.prefix :])
        if output_fmt == "NCHW":
            rows, columns = self._grid(x, episode)
            patches = [
                each.unflatten(1, (rows, columns)).permute(0, 3, 1, 2).contiguous()
                for each in patches
            ]
        last = seen[max(wanted)] if stop_early else episode.tokens
        told = return_prefix_tokens and bool(backbone.prefix)
        if output_dict:
            found: dict[str, Any] = {"image_intermediates": patches}
            found |= {"image_intermediates_prefix": prefix} if told else {}
            if not intermediates_only:
                found["image_features"] = self._features(last)[:count]
            return found
        both: list[Any] = list(zip(patches, prefix, strict=True)) if told else patches
        return both if intermediates_only else (self._features(last)[:count], both)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:
        """:meth:`forward_intermediates` in DINO's form: the tokens after some of the blocks.

        Args:
            x: images ``(B, C, H, W)``, normalised.
            n: the blocks, or how many last ones.
            reshape: whether to return ``(B, D, rows, columns)`` instead of ``(B, P, D)``.
            return_prefix_tokens: whether to return pairs with the prefix tokens.
            norm: whether to apply the final norm.

        Raises:
            UserError: an index that there is not.
        """
        found: list[Any] = self.forward_intermediates(
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
        )
        return found

    def _features(self, tokens: Tokens) -> Tensor:
        family = self.backbone.family
        if family.pooling == "attention" and (tokens.ragged or tokens.moved):
            raise UserError(
                "tokens that left can't be hidden from this model's attention pool: "
                "call the model itself instead of forward_features"
            )
        return self._by_patch(tokens, norm=True)

    def _by_patch(self, tokens: Tokens, *, norm: bool) -> Tensor:
        """``(B, prefix + P, D)``; a pruned patch has the mean of the tokens that the head pools."""
        tokens, family = unpack(tokens), self.backbone.family
        known, first = tokens.patch_alive(), family.first_pooled
        y = family.norm(tokens.x) if norm else tokens.x
        weight = (tokens.size * tokens.alive)[:, first:, None]
        total = weight.sum(1, keepdim=True).clamp(min=1)
        mean = (y[:, first:] * weight).sum(1, keepdim=True) / total
        patches = tokens.to_patches(y[:, tokens.prefix :])
        patches = torch.where(known[..., None], patches, mean.to(y.dtype))
        return torch.cat([y[:, : tokens.prefix], patches], dim=1)

    def _grid(self, x: Tensor, episode: Episode) -> tuple[int, int]:
        """Rows and columns of patches of the images that ran."""
        if episode.backbone is not self.backbone:  # smaller images
            return episode.backbone.grid
        rows, columns = self.model.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        return rows, columns


def _wanted(indices: int | Sequence[int] | None, depth: int) -> list[int]:
    """Indices of blocks, from what timm takes for them."""
    count = depth if indices is None else indices
    if isinstance(count, int):
        found = list(range(depth - count, depth))
    else:
        found = [depth + index if index < 0 else index for index in count]
    if not found or min(found) < 0 or max(found) >= depth:
        raise UserError(
            f"indices={indices!r}: the model has blocks 0 to {depth - 1}, give some of them or how "
            "many last ones"
        )
    return found


def _below_model(patterns: Any) -> Any:
    """Timm's patterns of names, as text, pairs or a list of these, for names below ``model.``."""
    if isinstance(patterns, str):
        # timm matches names from their first character on, with or without this sign.
        bare = re.sub(r"(?<![\\[])\^", "", patterns)
        return rf"^model\.(?:{bare})"
    if isinstance(patterns, list | tuple) and patterns:
        if isinstance(patterns, tuple):
            return (_below_model(patterns[0]), *patterns[1:])
        return [_below_model(each) for each in patterns]
    return patterns
