"""Accuracy, cost and speed of a method beside the dense model."""

from tokenenv.measure.evaluation import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
