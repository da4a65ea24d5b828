"""An ONNX file that a user named, to be measured beside its dense model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenenv.api.made_of import MadeOf
from tokenenv.data import Preprocessing
from tokenenv.deploy.about import apply_description
from tokenenv.deploy.candidate import OnnxCandidate
from tokenenv.deploy.runtime import OnnxModel, load_onnx
from tokenenv.errors import UserError
from tokenenv.measure.candidate import Candidate
from tokenenv.measure.opening import Model
from tokenenv.vit.backbone import Backbone
from tokenenv.vit.dense import Dense


@dataclass
class NamedOnnx:
    """A file that ``tokenenv compress --export`` wrote; see :class:`tokenenv.api.what.Named`."""

    what: str
    whole = False

    def __post_init__(self) -> None:
        self._path = Path(self.what)

    @cached_property
    def model(self) -> OnnxModel:
        """The file in ONNX Runtime."""
        return load_onnx(self._path)

    def made_of(self) -> MadeOf:
        """The dense model, whose weights are in the file."""
        said = self.model.said
        values = said.get("preprocessing")
        kept = None if values is None else Preprocessing.from_json(values, self._path)
        return MadeOf(said["model"], str(self._path), preprocessing=kept)

    def read(self, model: str, depth: int) -> None:
        """Check that it was made from ``model``."""
        made = self.model.said["model"]
        if made.split(".")[0] != model.split(".")[0]:
            raise UserError(
                f"'{self.what}' was made from '{made}', not '{model}': measure it with its own "
                "model"
            )

    def check(self, model: Model, outline: Backbone) -> None:
        """Check the precision."""
        if model.dtype != "float32" or model.device != "cpu":
            raise UserError(
                f"'{self.what}' runs in float32 on the CPU: leave --dtype and --device out"
            )

    def candidate(self, dense: Dense, model: Model) -> Candidate:
        """The file beside the dense model, which gets its class names."""
        apply_description({"classes": self.model.said.get("classes")}, dense.model, self._path)
        digest = hashlib.sha256(self._path.read_bytes()).hexdigest()
        return OnnxCandidate(
            self.what, self.model, dense, key=f"{self.what} {digest}", group=self.what
        )
