"""Zoology: how much a sequence-model architecture can recall, against how much recurrent memory it carries."""

from zoology.evaluate import evaluate

__all__ = ["evaluate"]
__version__ = "0.1.0"
