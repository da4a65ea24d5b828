"""A timm model and a method as one faster PyTorch module."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokenenv.artefact import FAULTS, read_object, reason_of
from tokenenv.data.labels import output_names
from tokenenv.data.pixels import Preprocess
from tokenenv.deploy.about import KINDS, apply_description, describe_model
from tokenenv.deploy.predict import Prediction, predict_files
from tokenenv.deploy.protocol import TimmProtocol
from tokenenv.errors import UserError, check_choice
from tokenenv.game.episode import Episode, Execution
from tokenenv.game.policy import DuckPolicy, Method, as_method, lengths_known, play
from tokenenv.game.segments import Segments
from tokenenv.own import same_place
from tokenenv.paths import as_path
from tokenenv.storage import check_new, new_folder
from tokenenv.vit import hooks
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.families import check_options
from tokenenv.vit.load import DTYPES, check_device, check_dtype, load_model
from tokenenv.vit.tokens import Tokens
from tokenenv.vit.twin import differing_setting

CONFIG, WEIGHTS, POLICY = "compressed.json", "model.safetensors", "policy.safetensors"
"""Files in the folder of a saved compressed model."""


_KINDS = {
    "model": str,
    "options": dict,
    "dtype": Literal[DTYPES],
    "execution": Execution | None,
    "checkpointed": bool | None,
    **KINDS,
}


def compress(model: nn.Module, policy: Method, execution: Execution | None = None) -> CompressedViT:
    """Make a model and a method one module; removed tokens are dropped from its tensors.

    Args:
        model: a timm model that :class:`Backbone` takes; it is copied and not changed.
        policy: the policy or reducer, such as one from ``agents.load`` or
            ``agents.parse_policy``; copied.
        execution: how images of different lengths share a batch, see
            :class:`~tokenenv.game.episode.Episode`; None: the device's default.

    Returns:
        The module, in ``eval`` mode.

    Raises:
        UserError: a model that is compressed already or not supported, a policy for another model,
            an unknown execution.
    """
    policy = as_method(policy)
    if isinstance(model, CompressedViT):
        raise UserError("the model is compressed already: compress the timm model it was made of")
    if execution is not None:
        check_choice("execution", execution, Execution)
    return CompressedViT(model, policy, execution)


class CompressedViT(TimmProtocol):
    """A timm Vision Transformer that removes tokens between blocks; made by :func:`compress`.

    Inputs and outputs are those of the timm model, without ``attn_mask``. The parameters are the
    timm model's own, below ``model``. Those of the policy are not among them: they stay in float32
    and are not trained with the model. timm's methods and attributes that training, feature
    extraction and optimisers use are those of :class:`~tokenenv.deploy.protocol.TimmProtocol`.

    Forward hooks on ``model``, on its blocks and on their attention fire once in each pass, as do
    those on the layers inside: with ``(B, N, D)`` tokens, N being those that are left of the
    longest image (all, with masked execution and in ``train`` mode). They may look, not change. A
    warning tells of hooks that can't fire, see :mod:`tokenenv.vit.hooks`. A pass that is compiled
    as one graph has none.

    In ``train`` mode removed tokens are masked, so that shapes stay fixed. Logits have a gradient
    in the model's parameters; the policy's decisions have none.

    ``torch.compile`` compiles the whole pass as one graph, for one batch size, if the method leaves
    as many tokens of every image (ToMe, EViT, DiffRate, top-k ...). Of other methods it compiles
    what lies between two decisions, for all lengths, see :class:`~tokenenv.game.segments.Segments`;
    such passes run padded. Those are not compiled where gradients are wanted. Nothing is in
    ``train`` mode, where the probability of stochastic depth differs from block to block. The
    layers must stay the same after the first compiled pass.

    Args:
        model: as for :func:`compress`.
        policy: likewise.
        execution: likewise.

    Attributes:
        model: the copy of the timm model.
        policy: the copy of the policy.
        execution: as given.
        method: the method, as a user named it; empty if it was given as an object.
        measured: what was measured of it, where and on which images, as JSON; empty if nothing was.
    """

    policy: Any
    method: str = ""

    def __init__(self, model: nn.Module, policy: Method, execution: Execution | None) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.execution = execution
        self.measured: dict[str, Any] = {}
        # Not registered with nn.Module: it does not belong into state_dict() or parameters().
        self.__dict__["policy"] = copy.deepcopy(policy)
        self.policy.check_fit(self.backbone, self.backbone.architecture)
        self.__dict__["policy"] = self.policy.calibrated(self.backbone)
        self._place_policy()
        self.eval()

    @property
    def backbone(self) -> Backbone:
        """The model cut into stages."""
        known = self.__dict__.get("_stages")
        # Modules may have been replaced, for example by quantisation, or the classifier reset.
        if (
            known is None
            or known.model is not self.model
            or known.blocks is not known.family.blocks
            or known.classes != known.family.classes
        ):
            family = known and type(known.family)  # which refuses quantised layers
            known = self.__dict__["_stages"] = Backbone(self.model, freeze=False, family=family)
        return known

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, C, H, W)``, normalised -> logits ``(B, classes)``."""
        if x.shape[0] == 0:
            return self.model(x)
        given = hooks.entering(self.model, x)
        logits = self._logits(x)
        hooks.leaving(self.model, given, logits)
        return logits

    def train(self, mode: bool = True) -> CompressedViT:
        """Set the mode of the model; the policy always decides as in evaluation."""
        super().train(mode)
        if isinstance(self.policy, nn.Module):
            self.policy.eval()
        return self

    @property
    def preprocess(self) -> Preprocess:
        """The model's transform: a PIL image -> ``(C, H, W)`` float32, normalised."""
        return Preprocess(self.model)

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, in the order of the logits; None if nobody knows them."""
        return output_names(self.model)

    def predict(
        self,
        paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        top: int = 1,
        batch: int = 64,
    ) -> list[Prediction]:
        """Class names and probabilities of image files.

        Args:
            paths: one file or several.
            top: how many classes to name of each image, the most probable first.
            batch: images per pass.

        Raises:
            UserError: a file is no image; nothing is returned of the others.
        """
        like = self.backbone

        def run(images: Tensor) -> Tensor:
            return self(images.to(like.device, like.dtype))

        return predict_files(run, self.preprocess, self.classes, paths, top, batch)

    def description(self) -> dict[str, Any]:
        """What an artefact says of the model, see :mod:`tokenenv.deploy.about`."""
        method = self.method or type(self.policy).__name__
        return describe_model(self.model, method, self.measured)

    def save(self, folder: str | Path) -> None:
        """Write the model's name, weights and policy as JSON and safetensors.

        :func:`load_compressed` reads the folder. After an error nothing is left of it.

        Args:
            folder: a new or an empty folder.

        Raises:
            UserError: the folder is not empty or can't be written, the policy can't be saved, the
                model was quantised, or timm makes a different one of the name and the options.
        """
        folder = as_path(folder, "folder")
        check_new(folder)
        self.policy.config()  # raises, before anything is written, if the policy can't be saved
        with new_folder(folder) as complete:
            self._write(complete)

    def _write(self, folder: Path) -> None:
        from safetensors.torch import save

        config = {
            "model": self.backbone.architecture,
            "options": self.backbone.family.options(),
            "dtype": str(self.backbone.dtype).removeprefix("torch."),
            "execution": self.execution,
            "checkpointed": self.backbone.family.checkpointed,
            **self.description(),
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        held = self.model.state_dict()
        strange = [name for name, t in held.items() if not isinstance(t, Tensor) or t.is_quantized]
        if strange:
            raise UserError(
                f"'{strange[0]}' is quantised and can't be saved: save the model before, and "
                "quantise what load_compressed gives"
            )
        state = {name: t.detach().cpu().contiguous() for name, t in held.items()}
        (folder / WEIGHTS).write_bytes(save(state))
        self.policy.save(folder / POLICY)
        self._check_twin(folder)
        self._check_method(folder)

    @torch.no_grad()
    def _check_twin(self, folder: Path) -> None:
        """Check that reading the folder gives an equal model."""
        words = (
            f"the model is not what timm makes of '{self.backbone.architecture}', its image size "
            "and pooling, and can't be read back: save its state_dict() and build it by your code"
        )
        try:
            read, _ = _load_model(folder, self.backbone.device)
        except UserError as error:
            raise UserError(f"{words} ({error})") from None
        shape = (1, *self.backbone.image_shape)
        image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        image = image.to(self.backbone.device, self.backbone.dtype)
        model = copy.deepcopy(self.model).eval()
        if not torch.allclose(model(image), read(image), rtol=1e-3, atol=1e-4):
            raise UserError(words)
        if reason := differing_setting(model, read):
            raise UserError(f"{words} ({reason})")

    def _check_method(self, folder: Path) -> None:
        """See that the method can be loaded, and is of the same class."""
        import agents  # the only policies that come with a way to read them back

        kind = type(self.policy)
        try:
            found = type(agents.load(folder, trust=True))  # its code runs in this process already
        except UserError as error:
            reason = error.__cause__ or error
            raise UserError(f"the {kind.__name__} can't be read back: {reason}") from error
        if not isinstance(self.policy, DuckPolicy) and not same_place(found, kind):
            raise UserError(
                f"the {kind.__name__} would be read back as the {found.__module__}."
                f"{found.__qualname__}: give your class another name"
            )

    def _play(
        self,
        x: Tensor,
        after_block: Callable[[int, Tokens], object] | None = None,
        *,
        only_logits: bool = False,
    ) -> Episode:
        if self._compiled and lengths_known(self.backbone, self.policy):
            return self._played(x, after_block, only_logits=only_logits)
        return self._outside(x, after_block, only_logits=only_logits)

    @property
    def _compiled(self) -> bool:
        """Whether torch compiles now, and the model is not in ``train`` mode."""
        return torch.compiler.is_dynamo_compiling() and not self.training

    def _logits(self, x: Tensor) -> Tensor:
        wanted = self._compiled and not torch.is_grad_enabled()
        if wanted and not lengths_known(self.backbone, self.policy):
            return self._segmented(x)
        logits = self._play(x, only_logits=True).logits
        assert logits is not None
        return logits

    @torch.compiler.disable
    def _segmented(self, x: Tensor) -> Tensor:
        known, backbone = self.__dict__.get("_segments"), self.backbone
        if known is None or known.backbone is not backbone:
            known = self.__dict__["_segments"] = Segments(backbone, self.policy)
        return known(x)

    def _played(
        self,
        x: Tensor,
        after_block: Callable[[int, Tokens], object] | None,
        *,
        only_logits: bool,
    ) -> Episode:
        return play(
            self.backbone,
            self.policy,
            x,
            "masked" if self.training else self.execution,
            only_logits=only_logits,
            after_block=after_block,
        )

    # Token counts depend on the data: a trace of the whole pass would recompile at each decision.
    _outside = torch.compiler.disable(_played)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressedViT:
        """Move or convert the model, and move the policy to its device."""
        super()._apply(fn, recurse)
        self._place_policy()
        self.__dict__.pop("_segments", None)  # whose graphs are for one type and device
        return self

    def _place_policy(self) -> None:
        if isinstance(self.policy, nn.Module):
            self.policy.to(self.backbone.device).eval()


def load_compressed(
    folder: str | Path, device: str | torch.device = "cpu", trust: bool = False
) -> CompressedViT:
    """The model that :meth:`CompressedViT.save` wrote.

    Args:
        folder: what it wrote.
        device: where to put the model.
        trust: whether code of somebody's own, which the folder names, may be run.

    Raises:
        UserError: no such folder, it is not complete, or its method is of a class of somebody's own
            and there is no ``trust``.
    """
    import agents  # imported late: it reads policies back

    folder = as_path(folder, "folder")
    model, config = _load_model(folder, check_device(device))
    fast = compress(model, agents.load(folder, trust), config.get("execution"))
    fast.method, fast.measured = config.get("method") or "", config.get("measured") or {}
    return fast


def _load_model(folder: Path, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """The dense model of a saved compressed one, and what the folder says of both.

    Raises:
        UserError: no such folder, or it is not complete.
    """
    blame = f"'{folder}' holds no compressed model"
    remedy = "give a folder that 'tokenenv compress' or save() wrote"
    config = read_object(folder / CONFIG, _KINDS, remedy, blame)
    try:
        options = check_options(config["options"])
        model: Any = load_model(config["model"], str(folder / WEIGHTS), options)
        apply_description(config, model, folder / CONFIG)
        if config.get("checkpointed"):
            model.set_grad_checkpointing(True)
    except UserError:
        raise
    except FAULTS as error:
        raise UserError(f"{blame} ({CONFIG}: {reason_of(error)}): {remedy}") from None
    return model.to(device, check_dtype(config["dtype"])), config
