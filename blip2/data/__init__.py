"""Training data: rows of pictures and texts, frozen image features on disk, and the order they come in."""

from blip2.data.features import FeatureFile, frozen_features
from blip2.data.jsonl import read_rows
from blip2.data.loader import BadPictures, Pictures, indices_of_step, prefetch
from blip2.data.sample import Row, Turn

__all__ = [
    "BadPictures",
    "FeatureFile",
    "Pictures",
    "Row",
    "Turn",
    "frozen_features",
    "indices_of_step",
    "prefetch",
    "read_rows",
]
