"""Scores of a model: on rows that have references, and on well-known benchmarks.

A row of a JSON-lines file names a picture, and has either a ``question`` with an ``answer`` or several ``answers``
(those of the people who were asked, or how many gave each), or ``captions`` (references), as ``blip2 rows`` writes
them. ``type``, of the question, makes a table by type. A benchmark is a description (`benchmarks`) by which such rows
are made of its files, asked as its published scores were, and written for those who score them.
"""

from blip2.evaluate.benchmark import PROTOCOLS
from blip2.evaluate.benchmarks import BENCHMARKS
from blip2.evaluate.evaluation import SCORES, Evaluation
from blip2.evaluate.examples import ANSWERS
from blip2.evaluate.robust import ROBUSTNESS, Robustness
from blip2.evaluate.run import begun, benchmarking, evaluate, evaluating, varying

__all__ = [
    "ANSWERS", "BENCHMARKS", "PROTOCOLS", "ROBUSTNESS", "SCORES", "Evaluation", "Robustness", "begun", "benchmarking",
    "evaluate", "evaluating", "varying",
]  # fmt: skip
