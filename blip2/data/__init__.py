"""Training data: rows of images and texts, frozen image features on disk, and the order of rows.

The names below are imported on first use, so that finding images in folders does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blip2.data.features import frozen_features
    from blip2.data.jsonl import read_rows
    from blip2.data.kept import FeatureFile
    from blip2.data.loader import BadImages, RowImages, prefetch
    from blip2.data.order import Order, indices_of_step
    from blip2.data.sample import Row, Turn

__all__ = [
    "BadImages",
    "FeatureFile",
    "Order",
    "Row",
    "RowImages",
    "Turn",
    "frozen_features",
    "indices_of_step",
    "prefetch",
    "read_rows",
]

_HOMES = {
    "BadImages": "blip2.data.loader",
    "FeatureFile": "blip2.data.kept",
    "Order": "blip2.data.order",
    "Row": "blip2.data.sample",
    "RowImages": "blip2.data.loader",
    "Turn": "blip2.data.sample",
    "frozen_features": "blip2.data.features",
    "indices_of_step": "blip2.data.order",
    "prefetch": "blip2.data.loader",
    "read_rows": "blip2.data.jsonl",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'blip2.data' has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}")
    return getattr(importlib.import_module(_HOMES[name]), name)
