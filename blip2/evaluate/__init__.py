"""Evaluation of a model, on rows with references and on well-known benchmarks.

A row of a JSON-lines file names an image, and has either a ``question`` with an ``answer`` or several ``answers`` (a
list, or the number of people who gave each), or ``captions`` (references), as ``blip2 rows`` writes them. The ``type``
of a question gives a table by type. A benchmark is described in `benchmarks`: how to make such rows of its files, the
settings of its published scores, and the file for its server.
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
