"""A timm model and a method as one faster PyTorch module."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokenenv.artefact import FAULTS, read_object, reason_of
from tokenenv.data import Preprocessing
from tokenenv.errors import UserError
from tokenenv.game.episode import EXECUTIONS, Episode, Execution, default_execution
from tokenenv.game.policy import DuckPolicy, Method, as_method, lengths_known, play
from tokenenv.own import same_place
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.families import check_options
from tokenenv.vit.load import DTYPES, check_device, check_dtype, load_model

CONFIG, WEIGHTS, POLICY = "compressed.json", "model.safetensors", "policy.safetensors"
"""Files in the folder of a saved compressed model."""


_KINDS = {"model": str, "options": dict, "dtype": Literal[DTYPES], "execution": Execution | None}


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
    if execution is not None and execution not in EXECUTIONS:
        raise UserError(f"execution='{execution}': choose from {', '.join(EXECUTIONS)}")
    return CompressedViT(model, policy, execution)


class CompressedViT(nn.Module):
    """A timm Vision Transformer that removes tokens between blocks; made by :func:`compress`.

    Inputs and outputs are those of the timm model, without ``attn_mask``. The parameters are the
    timm model's own, below ``model``. Those of the policy are not among them: they stay in float32
    and are not trained with the model.

    In ``train`` mode removed tokens are masked, so that shapes stay fixed. Logits have a gradient
    in the model's parameters; the policy's decisions have none.

    ``torch.compile`` compiles the whole pass as one graph, for one batch size, if the method leaves
    as many tokens of every image (ToMe, EViT, DiffRate, top-k ...). Of other methods it compiles
    what a block does to each token, once for all lengths and blocks; the attention kernel and the
    decisions are not compiled. Nothing is in ``train`` mode, where the probability of stochastic
    depth differs from block to block.

    Args:
        model: as for :func:`compress`.
        policy: likewise.
        execution: likewise.

    Attributes:
        model: the copy of the timm model.
        policy: the copy of the policy.
        execution: as given.
        pretrained_cfg: that of the timm model, which timm's preprocessing reads.
    """

    model: Any
    policy: Any

    def __init__(self, model: nn.Module, policy: Method, execution: Execution | None) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.execution = execution
        # Not registered with nn.Module: it does not belong into state_dict() or parameters().
        self.__dict__["policy"] = copy.deepcopy(policy)
        self.policy.check_fit(self.backbone, self.backbone.architecture)
        self.pretrained_cfg = getattr(self.model, "pretrained_cfg", {})
        self._place_policy()
        self.eval()

    @property
    def backbone(self) -> Backbone:
        """The model cut into stages."""
        known = self.__dict__.get("_stages")
        # Modules may have been replaced, for example by quantisation.
        if (
            known is None
            or known.model is not self.model
            or known.blocks is not known.family.blocks
        ):
            known = self.__dict__["_stages"] = Backbone(self.model, freeze=False)
        return known

    @property
    def num_classes(self) -> int:
        """Number of classes, as of the timm model."""
        return self.model.num_classes

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, C, H, W)``, normalised -> logits ``(B, classes)``."""
        if x.shape[0] == 0:
            return self.model(x)
        logits = self._play(x, only_logits=True).logits
        assert logits is not None
        return logits

    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` -> tokens ``(B, prefix + P, D)`` after the final norm.

        One token per patch, in timm's order. A merged patch has the token that it was merged into.
        A pruned one has the mean of the tokens that the head pools, so that :meth:`forward_head`
        returns the logits of :meth:`forward`. If the method makes images smaller, P is the number
        of patches of the smaller image.

        Raises:
            UserError: the model pools by attention, which would read the pruned patches.
        """
        if x.shape[0] == 0:
            return self.model.forward_features(x)
        tokens, family = self._play(x).tokens, self.backbone.family
        known = tokens.patch_alive()
        if family.pooling == "attention" and (tokens.ragged or tokens.moved):
            raise UserError(
                "tokens that left can't be hidden from this model's attention pool: "
                "call the model itself instead of forward_features"
            )
        y, first = family.norm(tokens.x), family.first_pooled
        weight = (tokens.size * tokens.alive)[:, first:, None]
        total = weight.sum(1, keepdim=True).clamp(min=1)
        mean = (y[:, first:] * weight).sum(1, keepdim=True) / total
        patches = tokens.to_patches(y[:, tokens.prefix :])
        patches = torch.where(known[..., None], patches, mean.to(y.dtype))
        return torch.cat([y[:, : tokens.prefix], patches], dim=1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens of :meth:`forward_features` -> logits, or what the classifier reads."""
        return self.model.forward_head(x, pre_logits=pre_logits)

    def train(self, mode: bool = True) -> CompressedViT:
        """Set the mode of the model; the policy always decides as in evaluation."""
        super().train(mode)
        if isinstance(self.policy, nn.Module):
            self.policy.eval()
        return self

    def save(self, folder: str | Path) -> None:
        """Write the model's name, weights and policy as JSON and safetensors.

        :func:`load_compressed` reads the folder. After an error nothing is left of it.

        Args:
            folder: a new or an empty folder.

        Raises:
            UserError: the folder is not empty or can't be written, the policy can't be saved, or
                timm makes a different model of the name, image size and pooling.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"'{folder}' exists already: choose another folder")
        self.policy.config()  # raises, before anything is written, if the policy can't be saved
        try:
            folder.resolve().parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.resolve().parent, prefix=".") as place:
                complete = Path(place, "complete")
                complete.mkdir()
                self._write(complete)
                complete.replace(folder.resolve())
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write to '{folder}' ({reason}): choose another") from None

    def _write(self, folder: Path) -> None:
        from safetensors.torch import save

        config = {
            "model": self.backbone.architecture,
            "options": self.backbone.family.options(),
            "dtype": str(self.backbone.dtype).removeprefix("torch."),
            "execution": self.execution,
            "preprocessing": Preprocessing.of(self.model).to_json(),
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        state = {name: t.detach().cpu().contiguous() for name, t in self.model.state_dict().items()}
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
        same = torch.allclose(model(image), read(image), rtol=1e-3, atol=1e-4)
        if not same or _dropped(model) != _dropped(read):
            raise UserError(words)

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

    def _play(self, x: Tensor, *, only_logits: bool = False) -> Episode:
        compiled = torch.compiler.is_dynamo_compiling()
        if compiled and not self.training and lengths_known(self.backbone, self.policy):
            execution = self.execution or default_execution(self.backbone.device)
            return play(self.backbone, self.policy, x, execution, only_logits=only_logits)
        return self._play_outside(x, compiled, only_logits)

    # Token counts depend on the data: a trace of the whole pass would recompile at each decision.
    @torch.compiler.disable
    def _play_outside(self, x: Tensor, compiled: bool, only_logits: bool) -> Episode:
        self.backbone.compiled = compiled and not self.training
        execution = self.execution or default_execution(self.backbone.device)
        if self.training:
            execution = "masked"
        return play(self.backbone, self.policy, x, execution, only_logits=only_logits)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressedViT:
        """Move or convert the model, and move the policy to its device."""
        super()._apply(fn, recurse)
        self._place_policy()
        return self

    def _place_policy(self) -> None:
        if isinstance(self.policy, nn.Module):
            self.policy.to(self.backbone.device).eval()


def _dropped(model: nn.Module) -> list[float]:
    """Probability of dropout or stochastic depth of every module, 0 for modules without."""
    known = (m.__dict__.get("p", m.__dict__.get("drop_prob", 0.0)) for m in model.modules())
    return [float(rate or 0.0) for rate in known]


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

    folder = Path(folder)
    model, execution = _load_model(folder, check_device(device))
    return compress(model, agents.load(folder, trust), execution)


def _load_model(folder: Path, device: torch.device) -> tuple[nn.Module, Execution | None]:
    """The dense model of a saved compressed one, and how it runs.

    Raises:
        UserError: no such folder, or it is not complete.
    """
    blame = f"'{folder}' holds no compressed model"
    remedy = "give a folder that 'tokenenv compress' or save() wrote"
    config = read_object(folder / CONFIG, _KINDS, remedy, blame)
    try:
        options = check_options(config["options"])
        model = load_model(config["model"], str(folder / WEIGHTS), options)
        if (said := config.get("preprocessing")) is not None:
            Preprocessing.from_json(said, folder / CONFIG).apply(model)
    except UserError:
        raise
    except FAULTS as error:
        raise UserError(f"{blame} ({CONFIG}: {reason_of(error)}): {remedy}") from None
    return model.to(device, check_dtype(config["dtype"])), config.get("execution")
