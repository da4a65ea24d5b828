"""What a user names to evaluate, time, compare or compress; opened in two steps.

First the words are parsed, which needs neither weights nor images, so that a mistake is found at
once. Then, when the dense model is open, each becomes a candidate.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from agents.policies import POLICY
from agents.policies.words import code_of, folder_of, parse_policy, split_name
from agents.training import Run
from agents.training.run import CONFIG as RUN_CONFIG
from agents.training.run import MODEL, REPORT
from tokenenv.api.made_of import MadeOf
from tokenenv.api.named_onnx import NamedOnnx
from tokenenv.artefact import read_object
from tokenenv.data import Preprocessing
from tokenenv.deploy.compressed import CONFIG as COMPRESSED
from tokenenv.deploy.compressed import CompressedViT, load_compressed
from tokenenv.errors import UserError
from tokenenv.game.checks import check_range
from tokenenv.game.policy import Method, as_method
from tokenenv.ltm.model import LTM
from tokenenv.ltm.storage import CONFIG as LTM_CONFIG
from tokenenv.ltm.storage import load_ltm
from tokenenv.measure.candidate import Candidate, MethodCandidate, ModelCandidate
from tokenenv.measure.opening import Model
from tokenenv.measure.state import fingerprint
from tokenenv.onnx_file import ONNX
from tokenenv.paths import path_text
from tokenenv.storage import read_tensors
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.dense import Dense
from tokenenv.vit.load import load_backbone

_SAID = {"model": str, "weights": str | None}


class Named(Protocol):
    """A method or a model that a user named.

    Attributes:
        what: its name in tables.
        whole: whether it is a model of its own, so that the dense one need not be cut into stages.
    """

    what: str
    whole: bool

    def made_of(self) -> MadeOf:
        """The dense model that it was made from, as far as it is known."""

    def read(self, model: str, depth: int) -> None:
        """Parse everything that needs no weights, for a model of ``depth`` blocks.

        Raises:
            UserError: it can't be parsed, or is made for another model.
        """

    def check(self, model: Model, outline: Backbone) -> None:
        """Check it against a model before weights are loaded.

        Args:
            model: what the user said of it.
            outline: the model without weights, of the size that its name says.

        Raises:
            UserError: it doesn't fit the model.
        """

    def candidate(self, dense: Dense, model: Model) -> Candidate:
        """Load it, to be measured beside ``dense``, which ``model`` names.

        Raises:
            UserError: it can't be loaded, or doesn't fit the model.
        """


def name_what(what: Any, trust: bool = False) -> Named:
    """Sort what a user gave by its kind.

    Args:
        what: a word, a folder, a run, a method, a model with LTM blocks, or a compressed model.
        trust: whether to run third-party code that a file names.

    Raises:
        UserError: it is none of these, or a folder with arguments that it can't take.
    """
    if isinstance(what, Run):
        what, trust = what.folder, trust or what.trust
    if isinstance(what, os.PathLike):
        what = os.fspath(what)
    if isinstance(what, LTM):
        return NamedLTM("LTM", what, trust)
    if isinstance(what, CompressedViT):
        return NamedCompressed("compressed", what, trust)
    if not isinstance(what, str):
        method = as_method(what)
        return NamedMethod(_title(method), method)
    if os.path.isdir(what):
        what = path_text(what, "WHAT")
    if what.endswith(ONNX):
        return NamedOnnx(what)
    folder, more = split_name(what)
    for config, kind, words in (
        (LTM_CONFIG, NamedLTM, "has LTM blocks"),
        (COMPRESSED, NamedCompressed, "is a compressed model"),
    ):
        if os.path.isfile(os.path.join(folder, config)):
            if more:
                raise UserError(
                    f"'{folder}' {words}, nothing of which can be set here: leave ':{more}' out"
                )
            return kind(what, None, trust)
    return NamedWord(what, trust)


def _kind(method: Method) -> str:
    return type(method).__name__


def _title(method: Method) -> str:
    """A name for a method given as an object: its class, with its settings if they are short."""
    shown = repr(method)
    return shown if is_dataclass(method) and len(shown) <= 80 else _kind(method)


def _key(what: str, method: Method) -> str:
    """Identify a method given as an object: by config and parameters, else by the object's id."""
    try:
        config = json.dumps(method.config(), sort_keys=True)
    except UserError:
        return f"{what} {id(method)}"
    tensors = dict(method.state_dict()) if isinstance(method, nn.Module) else {}
    return f"{what} {hashlib.sha256(config.encode()).hexdigest()} {fingerprint(tensors)}"


@dataclass
class NamedMethod:
    """A policy or a reducer given as an object."""

    what: str
    method: Method
    whole = False

    def made_of(self) -> MadeOf:
        """The model that the method was trained on."""
        return MadeOf(self.method.trained_on.split(".")[0] or None)

    def read(self, model: str, depth: int) -> None:
        """Do nothing: there are no words to parse."""

    def check(self, model: Model, outline: Backbone) -> None:
        """Check the method."""
        _check_early(self.method, model, outline)

    def candidate(self, dense: Dense, model: Model) -> Candidate:
        """The method on the dense model."""
        assert isinstance(dense, Backbone)
        self.method.check_fit(dense, model.name)
        method = self.method.calibrated(dense).on(dense.device)
        return MethodCandidate(
            self.what,
            method,
            dense,
            key=_key(self.what, method),
            group=_kind(self.method),
        )


@dataclass
class NamedWord:
    """A method named by a word, a run folder or a shipped policy's name, or a user's own."""

    what: str
    trust: bool
    whole = False
    method: Method | None = None

    @property
    def folder(self) -> Path | None:
        """Folder of the run or shipped policy; None for anything else."""
        return folder_of(self.what)

    def made_of(self) -> MadeOf:
        """The model that the folder's config names."""
        return MadeOf() if self.folder is None else _said_by(self.folder)

    def read(self, model: str, depth: int) -> None:
        """Parse the word, or read the policy's file."""
        self.method = parse_policy(self.what, depth, trust=self.trust)
        if self.folder is None:
            check_range(self.method.reduction.blocks, depth)

    def check(self, model: Model, outline: Backbone) -> None:
        """Check the method, unless it has fine-tuned weights, whose model may be another."""
        assert self.method is not None
        if self.made_of().tuned is None:
            _check_early(self.method, model, outline)

    def candidate(self, dense: Dense, model: Model) -> Candidate:
        """The method on the dense model, or on the model fine-tuned with it."""
        assert isinstance(dense, Backbone) and self.method is not None
        known, method, backbone = self.made_of(), self.method, dense
        if self.folder is None:
            digest = hashlib.sha256(code_of(self.what).encode())
        else:
            digest = hashlib.sha256((self.folder / POLICY).read_bytes())
        if known.tuned is not None:
            check_same_model(self.what, known, model.name)
            digest.update(Path(known.tuned).read_bytes())
            backbone = load_backbone(
                model.name, known.tuned, dense.device, dense.dtype, model.prepare
            )
        method.check_fit(backbone, model.name)
        ready = method.calibrated(backbone)
        if ready is not method:  # what images told counts as well
            digest.update(_key("", ready).encode())
        key = f"{self.what} {digest.hexdigest()}"
        frozen = known.tuned is None
        group = split_name(self.what)[0]
        return MethodCandidate(self.what, ready.on(dense.device), backbone, frozen, key, group)


@dataclass
class NamedLTM:
    """A model with LTM blocks, as an object or as the folder of one."""

    what: str
    model: LTM | None
    trust: bool
    whole = True

    def made_of(self) -> MadeOf:
        """The model that the folder's config names, or that the object was made from."""
        if self.model is not None:
            name = self.model.pretrained_cfg.get("architecture") or None
            return MadeOf(name, preprocessing=Preprocessing.of(self.model.model))
        run, own = Path(self.what, RUN_CONFIG), Path(self.what, LTM_CONFIG)
        blame = f"'{self.what}' holds no LTM model, or doesn't say which one it was made of"
        if run.is_file():
            known = read_object(run, _SAID, "restore it", blame)
            return MadeOf(
                known["model"], known.get("weights"), preprocessing=_preprocessing(known, run)
            )
        said = read_object(own, {"model": str, "ltm": dict}, "restore it", blame)
        return MadeOf(said["model"], preprocessing=_preprocessing(said, own))

    def read(self, model: str, depth: int) -> None:
        """Check that it was made from ``model``."""
        known = self.made_of().model
        if known is not None and known != model:
            raise UserError(
                f"'{self.what}' is a {known} with LTM blocks, not a {model}: "
                "compare it with its own model"
            )

    def check(self, model: Model, outline: Backbone) -> None:
        """Do nothing: it has a model of its own."""

    def candidate(self, dense: Dense, model: Model) -> Candidate:
        """The model with LTM blocks, in eval mode."""
        if self.model is not None:
            own = copy.deepcopy(self.model).to(dense.device, dense.dtype).eval()
            blocks = json.dumps(own.config, sort_keys=True)
            key = f"{self.what} {blocks} {fingerprint(own.state_dict())}"
            return ModelCandidate(self.what, own, key=key, group=self.what)
        digest = hashlib.sha256(Path(self.what, MODEL).read_bytes()).hexdigest()
        loaded = load_ltm(self.what, dense.device).to(dense.dtype)
        return ModelCandidate(self.what, loaded, key=f"{self.what} {digest}", group=self.what)


@dataclass
class NamedCompressed:
    """A compressed model, as an object or as the folder of one."""

    what: str
    model: CompressedViT | None
    trust: bool
    whole = False

    def made_of(self) -> MadeOf:
        """The model and weights that the folder or the object holds."""
        if self.model is not None:
            name = self.model.backbone.architecture or None
            return MadeOf(name, preprocessing=Preprocessing.of(self.model.model))
        return replace(_said_in(Path(self.what, COMPRESSED)), weights=str(Path(self.what, MODEL)))

    def read(self, model: str, depth: int) -> None:
        """Do nothing: there are no words to parse."""

    def check(self, model: Model, outline: Backbone) -> None:
        """Do nothing: it has a model of its own."""

    def candidate(self, dense: Dense, model: Model) -> Candidate:
        """The compressed model's method on its own backbone."""
        if self.model is not None:
            if type(self.model.backbone.family).refusal(self.model.model) is not None:
                raise UserError(
                    f"'{self.what}' can't be measured, as its layers were quantised or replaced "
                    "and multiply-adds are counted from timm's: measure it before"
                )
            fast = copy.deepcopy(self.model).to(dense.device, dense.dtype).eval()
            key = f"{_key(self.what, fast.policy)} {fingerprint(fast.model.state_dict())}"
        else:
            fast = load_compressed(self.what, dense.device, trust=self.trust).to(dense.dtype)
            digest = hashlib.sha256(Path(self.what, POLICY).read_bytes())
            digest.update(Path(self.what, MODEL).read_bytes())
            key = f"{self.what} {digest.hexdigest()}"
        return MethodCandidate(self.what, fast.policy, fast.backbone, key=key, group=self.what)


def _check_early(method: Method, model: Model, outline: Backbone) -> None:
    if model.from_file:  # the file may be of another image size
        method.check_model(model.name)
    else:
        method.check_fit(outline, model.name)


def method_of(what: Any, depth: int, trust: bool = False) -> Method:
    """The policy or reducer that a user named, for a model of ``depth`` blocks.

    Raises:
        UserError: it can't be parsed, or is a whole model and no method.
    """
    named = name_what(what, trust)
    if isinstance(named, NamedWord):
        named.read("", depth)
        assert named.method is not None
        return named.method
    if isinstance(named, NamedMethod):
        return named.method
    raise UserError(no_method(named))


def no_method(named: Named) -> str:
    """The error message for a whole model where a method is needed."""
    if isinstance(named, NamedLTM):
        loaded = f": tokenenv.ltm.load_ltm('{named.what}') gives it" if named.model is None else ""
        return f"'{named.what}' is a model already, whose tokens merge by themselves{loaded}"
    if isinstance(named, NamedOnnx):
        return f"'{named.what}' is a whole model: give the method it was made with"
    return f"'{named.what}' is compressed already: give the policy it was made with"


def check_same_model(what: str, known: MadeOf, model: str | None) -> None:
    """Check that ``model``, if given, is the one that was fine-tuned.

    Raises:
        UserError: it is another model.
    """
    if model is not None and known.model and model.split(".")[0] != known.model.split(".")[0]:
        raise UserError(
            f"{what}: a {known.model} was fine-tuned there, not a {model}: take that model"
        )


def _said_by(folder: Path) -> MadeOf:
    """Model and weights of a run folder or a shipped policy, as its files name them.

    Raises:
        UserError: no file names them, or the run's own weights are missing.
    """
    config = folder / RUN_CONFIG
    if not config.is_file():
        known = read_tensors(folder / POLICY)[1].get("trained_on")
        return MadeOf(known if isinstance(known, str) else None)
    said = _said_in(config)
    own = folder / MODEL
    if own.is_file():
        return replace(said, tuned=str(own))
    if _fine_tuned(folder):
        raise UserError(f"run '{folder}' was fine-tuned and '{own}' is missing: restore it")
    return said


def _fine_tuned(folder: Path) -> bool:
    """Whether a run's files say that its backbone was trained; old ones don't, and it was not."""
    for file in (folder / RUN_CONFIG, folder / REPORT):
        with contextlib.suppress(UserError):  # missing, or not a run's
            if read_object(file, {}, "restore it").get("frozen") is False:
                return True
    return False


def _preprocessing(said: dict[str, Any], path: Path) -> Preprocessing | None:
    """What the JSON of a file says; runs of earlier versions say nothing."""
    values = said.get("preprocessing")
    return None if values is None else Preprocessing.from_json(values, path)


def _said_in(config: Path) -> MadeOf:
    """Model, weights and preprocessing that a config file names."""
    blame = f"'{config}' doesn't say model and weights"
    found = read_object(config, _SAID, "restore it, or give --model and --weights", blame)
    return MadeOf(found["model"], found.get("weights"), preprocessing=_preprocessing(found, config))
