"""An ONNX file of ours in ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenenv.data import Preprocessing
from tokenenv.data.pixels import Preprocess
from tokenenv.deploy.about import KINDS
from tokenenv.deploy.predict import Prediction, predict_files
from tokenenv.errors import UserError
from tokenenv.onnx_file import check_packages, description
from tokenenv.paths import as_path

FIELDS = {"model": str, "options": dict, "batched": bool, **KINDS}
"""The fields of a file's description, and their kinds."""


class OnnxModel:
    """An ONNX model on the CPU, with as many threads as torch has when it is made.

    Args:
        content: the file's content.
        batched: whether it takes batches; else images run one after another.
        said: the file's description.

    Attributes:
        batched, said: as given.
        shape: ``(C, H, W)`` of its images.

    Raises:
        UserError: onnxruntime is missing, or can't run the file.
    """

    def __init__(self, content: bytes, *, batched: bool, said: Mapping[str, Any] = {}) -> None:
        check_packages("onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors; it warns of constants that the graph doesn't use
        try:
            self._session = onnxruntime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
            (images,), (logits,) = self._session.get_inputs(), self._session.get_outputs()
            self._names = images.name, logits.name
            self.shape = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
        except Exception as error:  # onnxruntime's kinds have no common class
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"onnxruntime can't run the file ({reason}): export it again") from None
        self.batched, self.said = batched, said

    def __call__(self, images: Tensor) -> Tensor:
        """Images ``(B, C, H, W)``, normalised -> logits ``(B, classes)``, float32."""
        if not self.batched and len(images) > 1:
            return torch.cat([self(image) for image in images.split(1)])
        (images_name, logits_name), pixels = self._names, images.float().cpu().numpy()
        return torch.from_numpy(self._session.run([logits_name], {images_name: pixels})[0])

    @property
    def preprocess(self) -> Preprocess:
        """The transform that the file describes: a PIL image -> ``(C, H, W)``, normalised."""
        said = Preprocessing.from_json(self.said.get("preprocessing"), "the file's description")
        return Preprocess.by(said, self.shape[0])

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, in the order of the logits; None if the file has none."""
        return self.said.get("classes")

    def predict(
        self,
        paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        top: int = 1,
        batch: int = 64,
    ) -> list[Prediction]:
        """As :meth:`tokenenv.CompressedViT.predict`."""
        return predict_files(self, self.preprocess, self.classes, paths, top, batch)


def load_onnx(path: str | os.PathLike[str]) -> OnnxModel:
    """The model in an ONNX file that :func:`tokenenv.export_onnx` wrote, in ONNX Runtime.

    Args:
        path: the file. It may hold no code; nothing but its graph is executed.

    Raises:
        UserError: there is no such file, it is none of ours, or a package is missing.
    """
    path = as_path(path, "path")
    said = description(path, FIELDS)
    return OnnxModel(Path(path).read_bytes(), batched=said["batched"], said=said)
