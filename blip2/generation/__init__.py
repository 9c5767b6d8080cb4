"""Decoding: options (`options`), changes to the logits (`filters`), the choice of a token (`strategies`), the end of an
answer (`endings`), the running batch (`batch`), and the interface (`engine`)."""

from __future__ import annotations

from blip2.generation.batch import Batch, Job
from blip2.generation.endings import Hypothesis
from blip2.generation.engine import Engine, finished
from blip2.generation.options import GenerateOptions

__all__ = ["Batch", "Engine", "GenerateOptions", "Hypothesis", "Job", "finished"]
