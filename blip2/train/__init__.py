"""Training in the two stages of the paper. `run` executes a recipe, `preview` shows what it would do, and `overfit`
tests it on a few rows."""

from blip2.train.group import OtherProcessFailed
from blip2.train.loop import TrainingStopped
from blip2.train.meter import Progress, TrainingFailed
from blip2.train.overfit import Verdict, overfit
from blip2.train.preview import Preview, preview
from blip2.train.recipes import Recipe, load_recipe
from blip2.train.run import run

__all__ = [
    "OtherProcessFailed", "Preview", "Progress", "Recipe", "TrainingFailed", "TrainingStopped", "Verdict",
    "load_recipe", "overfit", "preview", "run",
]  # fmt: skip
