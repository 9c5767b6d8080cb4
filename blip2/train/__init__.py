"""Training, in the two stages of the paper: `run` carries out a recipe."""

from blip2.train.group import ToldElsewhere
from blip2.train.loop import Progress, TrainingFailed, TrainingStopped
from blip2.train.recipes import Recipe, load_recipe
from blip2.train.run import run

__all__ = ["Progress", "Recipe", "ToldElsewhere", "TrainingFailed", "TrainingStopped", "load_recipe", "run"]
