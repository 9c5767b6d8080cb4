"""BLIP-2 from scratch: image captioning, visual question answering, image-text matching.

    import blip2

    blip = blip2.load()
    blip.caption("picture.png")

The names below are imported on first use, so that ``import blip2`` is fast.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blip2.api import Matcher, Pipeline, load
    from blip2.api.collect import ask_collection, caption_collection, match_collection
    from blip2.compat import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2ForImageTextRetrieval,
        Blip2Model,
        Blip2Processor,
        Blip2QFormerConfig,
        Blip2QFormerModel,
        Blip2TextModelWithProjection,
        Blip2VisionConfig,
        Blip2VisionModel,
        Blip2VisionModelWithProjection,
        BlipImageProcessor,
        BlipProcessor,
    )
    from blip2.encoded import EncodedImage
    from blip2.errors import Blip2Error
    from blip2.generation import GenerateOptions
    from blip2.index import Index
    from blip2.tasks.explain import Explanation
    from blip2.version import __version__

if "OMP_WAIT_POLICY" not in os.environ:
    # OpenMP's threads wait actively for each other. If another program uses one of the processors, two threads took six
    # times as long as one. Torch's OpenMP reads this variable when torch is imported; setting it later has no effect.
    os.environ.setdefault("GOMP_SPINCOUNT", "200")

__all__ = [
    "Blip2Config",
    "Blip2Error",
    "Blip2ForConditionalGeneration",
    "Blip2ForImageTextRetrieval",
    "Blip2Model",
    "Blip2Processor",
    "Blip2QFormerConfig",
    "Blip2QFormerModel",
    "Blip2TextModelWithProjection",
    "Blip2VisionConfig",
    "Blip2VisionModel",
    "Blip2VisionModelWithProjection",
    "BlipImageProcessor",
    "BlipProcessor",
    "EncodedImage",
    "Explanation",
    "GenerateOptions",
    "Index",
    "InstructBlipConfig",
    "InstructBlipForConditionalGeneration",
    "InstructBlipProcessor",
    "InstructBlipQFormerConfig",
    "InstructBlipVisionConfig",
    "Matcher",
    "Pipeline",
    "__version__",
    "ask_collection",
    "caption_collection",
    "load",
    "match_collection",
]

_HOMES = {
    "Blip2Config": "blip2.compat",
    "Blip2VisionConfig": "blip2.compat",
    "Blip2QFormerConfig": "blip2.compat",
    "Blip2Model": "blip2.compat",
    "Blip2QFormerModel": "blip2.compat",
    "Blip2TextModelWithProjection": "blip2.compat",
    "Blip2VisionModel": "blip2.compat",
    "Blip2VisionModelWithProjection": "blip2.compat",
    "Blip2Error": "blip2.errors",
    "Blip2ForConditionalGeneration": "blip2.compat",
    "Blip2ForImageTextRetrieval": "blip2.compat",
    "Blip2Processor": "blip2.compat",
    "BlipImageProcessor": "blip2.compat",
    "BlipProcessor": "blip2.compat",
    "EncodedImage": "blip2.encoded",
    "Explanation": "blip2.tasks.explain",
    "GenerateOptions": "blip2.generation",
    "Index": "blip2.index",
    "InstructBlipConfig": "blip2.compat",
    "InstructBlipForConditionalGeneration": "blip2.compat",
    "InstructBlipProcessor": "blip2.compat",
    "InstructBlipQFormerConfig": "blip2.compat",
    "InstructBlipVisionConfig": "blip2.compat",
    "Matcher": "blip2.api",
    "Pipeline": "blip2.api",
    "__version__": "blip2.version",
    "ask_collection": "blip2.api.collect",
    "caption_collection": "blip2.api.collect",
    "load": "blip2.api",
    "match_collection": "blip2.api.collect",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'blip2' has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
