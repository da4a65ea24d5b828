"""An ONNX file among what is measured beside the dense model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from tokenenv.artefact import Unfit, Within, check_fields
from tokenenv.data import ImageSource
from tokenenv.deploy.onnx import dense_onnx
from tokenenv.deploy.runtime import OnnxModel
from tokenenv.errors import UserError
from tokenenv.game.episode import Execution
from tokenenv.measure.candidate import Timing
from tokenenv.measure.evaluation import Evaluation, evaluate_model
from tokenenv.vit.dense import Dense

RUNTIME = "ONNX Runtime"
"""What tables call it."""

COUNTED: dict[str, Any] = {"gmacs": Within(0.0, 1e9), "tokens": list[float]}
"""What of a file's ``measured`` is needed, and its kinds."""


@dataclass(frozen=True)
class OnnxCandidate:
    """A model in ONNX Runtime, timed beside the dense model in ONNX Runtime.

    Multiply-adds and token counts are those that the file says, means over the images on which it
    was measured when it was made; other images may have others.

    Attributes:
        what, frozen, key, group: see :class:`~tokenenv.measure.candidate.Candidate`.
        model: the model.
        dense: the dense model, in torch.
        exported: the dense model in ONNX Runtime if it is there already; else it is exported when
            it is first used.

    Raises:
        UserError: the file doesn't say what was counted.
    """

    what: str
    model: OnnxModel
    dense: Dense
    frozen: bool = True
    key: str = ""
    group: str = ""
    exported: OnnxModel | None = None

    def __post_init__(self) -> None:
        try:
            check_fields(self.model.said.get("measured"), COUNTED)
        except Unfit as error:
            raise UserError(
                f"'{self.what}' doesn't say what it computes ({error}): write it with 'tokenenv "
                "compress --export'"
            ) from None

    @cached_property
    def dense_run(self) -> OnnxModel:
        """The dense model in ONNX Runtime."""
        return self.exported or dense_onnx(self.dense.model)

    def parameters(self) -> int:
        """Number of parameters of the dense model, whose weights it has."""
        return sum(p.numel() for p in self.dense.parameters())

    def evaluate(self, reference: Dense, source: ImageSource, **options: Any) -> Evaluation:
        """Evaluate it; the dense model runs in ONNX Runtime, too."""
        said = self.model.said["measured"]
        return evaluate_model(
            self.model,
            reference,
            source,
            lengths=said["tokens"],
            macs=1e9 * said["gmacs"],
            run_dense=self.dense_run,
            **options,
        )

    def timing(self, images: Tensor, execution: Execution | None) -> Timing:
        """See :meth:`~tokenenv.measure.candidate.Candidate.timing`."""
        gmacs = self.model.said["measured"]["gmacs"]
        return Timing(
            self.model,
            None,
            gmacs,
            dense={RUNTIME: self.dense_run},
            dtype="float32",
            runtime=RUNTIME,
        )
