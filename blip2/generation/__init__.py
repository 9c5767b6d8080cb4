"""Decoding: what is asked for (`options`), what changes the scores (`filters`), how a token is chosen
(`strategies`), when an answer is over (`endings`), what runs side by side (`batch`), and the way in (`engine`)."""

from __future__ import annotations

from blip2.generation.batch import Batch, Job
from blip2.generation.endings import Hypothesis
from blip2.generation.engine import Engine, finished
from blip2.generation.options import GenerateOptions

__all__ = ["Batch", "Engine", "GenerateOptions", "Hypothesis", "Job", "finished"]
