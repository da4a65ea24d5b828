"""Labelled images for a model: opening them, reading them, and their order in training."""

from tokenenv.data.opening import open_source
from tokenenv.data.pixels import Preprocessing
from tokenenv.data.source import Batch, ImageSource
from tokenenv.data.splits import Split
from tokenenv.data.stream import Stream

__all__ = ["Batch", "ImageSource", "Preprocessing", "Split", "Stream", "open_source"]
