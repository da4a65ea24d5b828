"""Labelled images for a model: sources, their order in training, and where they are opened."""

from tokenenv.data.opening import Split, open_source
from tokenenv.data.source import Batch, ImageSource
from tokenenv.data.stream import Stream

__all__ = ["Batch", "ImageSource", "Split", "Stream", "open_source"]
