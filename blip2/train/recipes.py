"""A training recipe: a TOML file that is read into frozen dataclasses. Unknown keys are errors.

Paths are relative to the recipe's folder. The defaults are those of the paper where it states them (section 3.4).
"""

from __future__ import annotations

import difflib
import math
import tomllib
import types
import typing
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from blip2.errors import RecipeError
from blip2.plaintext import NotTextError, read_text
from blip2.train.rules import check


@dataclass(frozen=True)
class MixRecipe:
    """Stage 2: relative frequencies of the kinds of text. A row may lack a kind."""

    captions: float = 1.0
    questions: float = 1.0
    dialogues: float = 1.0


@dataclass(frozen=True)
class SourceRecipe:
    """A collection: a folder, shards, parquet, JSON lines or COCO's files. ``data = "shards/{00000..00009}.tar"`` names
    a single one, ``[[data]]`` one of several."""

    source: tuple[str, ...]
    """Paths or patterns."""
    weight: float = 1.0
    """Share of the steps, relative to the other sources."""
    images: Path | None = None
    """Folder that paths in rows are relative to; default: the folder of the rows."""
    image: str | None = None
    """Column, or field of a shard, with the image; default: detected."""
    text: str | None = None
    """Column or field with the captions; default: detected."""
    question: str | None = None
    answer: str | None = None
    """Columns of a question and its answer or answers."""
    split: str | None = None
    """Split of Karpathy's files."""


@dataclass(frozen=True)
class DataRecipe:
    rows: tuple[Path, ...] = ()
    """JSON-lines files."""
    sources: tuple[SourceRecipe, ...] = ()
    """Collections, instead of ``rows``; read where they are."""
    images: Path | None = None
    """Folder that the rows' image paths are relative to; default: the folder of each file of rows."""
    features: Path | None = None
    """A folder for the output of the frozen image encoder, computed once; default: computed at every step."""
    features_dtype: Literal["fp16", "int8", "fp8"] = "fp16"
    """How features are stored: in half precision, or rounded to about half of that size with a scale for each token
    ("int8", or "fp8", which is e4m3)."""
    augment: Literal[False, True, "randaugment"] = False
    """Random crops of at least half of the image, mirrored half of the time; "randaugment" adds the changes of the
    authors' fine-tuning (see `image.randaugment`). Not with ``features``, which are those of whole images."""
    cleaning: Literal["none", "lavis"] = "none"
    """Lower-case captions and questions and remove most punctuation, as the authors' library does."""
    on_bad_picture: Literal["skip", "stop"] = "skip"
    """For an image that cannot be read: "skip" replaces its row by the next one with a readable image and logs it;
    "stop" saves the state and ends the training with an error."""
    max_text_tokens: int = 32
    """Stage 1: tokens of a caption, including [CLS] and [SEP]; stage 2: tokens of a caption or an answer, including the
    end token."""
    max_prompt_tokens: int = 128
    """Stage 2: tokens of a question and the dialogue before it; beyond that the oldest turns are left out."""
    caption_prompt: str = ""
    """Stage 2: prompt of captions; "a photo of" when fine-tuning."""
    question_prompt: str = ""
    """Stage 2: prompt of questions, such as "Question: {} Answer:"; default: as `text.QUESTION_TEMPLATES` has it."""
    texts_per_image: int = 1
    """Stage 2: texts of a row in one step. They share one pass of the Q-Former, unless the Q-Former reads them."""
    mix: MixRecipe = field(default_factory=MixRecipe)


@dataclass(frozen=True)
class OptimRecipe:
    steps: int
    batch_size: int
    """Images a step, over all processes."""
    accumulate: int = 1
    """Gradient accumulation: each process computes its share of a batch in this many parts, with the same losses and
    gradients in less memory. Stage 1 then computes the vectors for ITC twice."""
    peak_lr: float = 1e-4
    min_lr: float = 1e-5
    warmup_steps: int = 2000
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.05
    clip: float = 0.0
    """Largest norm of the gradient; 0: no clipping, as in the paper."""
    ema: float = 0.0
    """Decay of an exponential moving average of the trained weights, such as 0.999; the average is evaluated and
    exported. 0: none."""
    label_smoothing: float = 0.1
    """Stage 1: of ITC and ITG."""
    itc: Literal["exact", "lavis"] = "exact"
    """Stage 1: "lavis" uses the gradient of the authors' code on several devices, which is about half of ITC's."""
    itm: bool = True
    """Stage 1: whether the Q-Former also learns to tell right pairs from hard wrong ones."""
    itg: bool = True
    """Stage 1: whether the Q-Former also learns to generate captions; without both, ITC alone is trained."""


@dataclass(frozen=True)
class VisionRecipe:
    """Training of the image encoder, which is frozen and unchanged without this table."""

    learns: bool = False
    """Whether the image encoder is trained, in fp32. Not with ``data.features``, which need a frozen one."""
    layer_decay: float = 1.0
    """Learning rate of each block as a factor of that of the next block; for the last block, of that of the rest of the
    model (Clark et al. 2020). 1: the same for all."""
    image_size: int | None = None
    """Side of the images in pixels; default: as in ``start``. The position embeddings are interpolated."""


@dataclass(frozen=True)
class LoraRecipe:
    """Train adapters and freeze the layers that they belong to (see `train.lora`)."""

    parts: tuple[str, ...] = ("language",)
    """Parts with adapters: "language", "qformer" and "vision"."""
    targets: tuple[str, ...] = ()
    """Layers by their names in the published files, or the ends of these names ("q_proj"); default: all linear layers
    of the blocks."""
    rank: int = 16
    alpha: float = 32.0
    """The adapter's output is scaled by alpha / rank, or with ``rslora`` by alpha / sqrt(rank)."""
    dropout: float = 0.05
    """Dropout on the adapters' inputs."""
    rslora: bool = False
    base: Literal["auto", "fp32", "bf16", "int8", "int4"] = "auto"
    """Dtype of the frozen parts; int8 and int4 for the language model only. "auto": as without adapters."""
    trains_qformer: bool = False
    """Whether Q-Former and projection are trained as well; they are saved whole, beside the adapters."""


@dataclass(frozen=True)
class EvaluationRecipe:
    rows: tuple[Path, ...] = ()
    sources: tuple[SourceRecipe, ...] = ()
    images: Path | None = None
    max_rows: int = 1024


@dataclass(frozen=True)
class TrackRecipe:
    """Experiment trackers, see `train.trackers`."""

    to: tuple[str, ...] = ()
    """Any of "tensorboard", "trackio" and "wandb"."""
    project: str = "blip2"
    """Project name for trackio and wandb; a training has the name of its folder."""


@dataclass(frozen=True)
class Recipe:
    stage: Literal[1, 2]
    start: str
    """The model that training starts from: a folder in the published layout, a bundled or published model, or one of
    the hub that has been fetched (``blip2 pull``)."""
    out: Path
    """Folder for the finished model, the log and the state of training."""
    data: DataRecipe
    optim: OptimRecipe
    qformer: str | None = None
    """Stage 2: the result of stage 1 that the Q-Former is taken from; default: the Q-Former of ``start``."""
    text_branch: str | None = None
    """Stage 2: the result of stage 1 that the Q-Former's text branch is taken from, so that the Q-Former reads the
    prompt beside the image; an InstructBLIP is saved. Default: it reads the prompt if ``start`` is an InstructBLIP."""
    vision: VisionRecipe | None = None
    evaluation: EvaluationRecipe | None = None
    lora: LoraRecipe | None = None
    track: TrackRecipe = field(default_factory=TrackRecipe)
    seed: int = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    device: str = "auto"
    checkpoint_activations: tuple[str, ...] = ()
    """Any of "language", "qformer" and "vision": recompute the activations of their layers in the backward pass to save
    memory."""
    shard: tuple[str, ...] = ()
    """Any of "language" and "vision": each process keeps only a shard of their weights (see `train.shard`)."""
    threads: int = 0
    """CPU threads, and threads that decode images; 0: as many as cores."""
    log_every: int = 10
    evaluate_every: int = 1000
    checkpoint_every: int = 1000
    sample_every: int = 0
    """Write a page of held-out images with generated texts every so many steps; 0: none."""


def load_recipe(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe. ``overrides`` replaces values, by dotted names ("optim.steps") or nested dictionaries.

    A path as `str` is relative to the recipe's folder, a `Path` in ``overrides`` to the current one. Raises RecipeError
    with one line for anything invalid.
    """
    try:
        table = tomllib.loads(read_text(path))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); name a recipe (a TOML file)") from None
    except NotTextError as error:
        raise RecipeError(f"{path}: {error}") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise RecipeError(f"{path}: is not TOML ({error}); write a recipe like those in examples/recipes") from None
    _name_sources(table)
    try:
        _override(table, overrides or {})
    except (AttributeError, TypeError):
        names = ", ".join(overrides or {})
        raise RecipeError(f"{path}: {names}: names a key inside a value that is not a table") from None
    _name_sources(table)
    reader = _Reader(path)
    recipe = reader.build(Recipe, table, "")
    check(recipe, reader.error)
    return recipe


def _name_sources(table: dict[str, Any]) -> None:
    """Expand ``data = "a.tar"`` and ``[[data]]`` to a table with ``sources``."""
    if isinstance(table.get("data"), str | Path | list):
        table["data"] = {"sources": table["data"]}


def _override(table: dict[str, Any], overrides: dict[str, Any]) -> None:
    for name, value in overrides.items():
        *parents, last = name.split(".")
        inner = table
        for parent in parents:
            inner = inner.setdefault(parent, {})
        if isinstance(value, dict):
            _override(inner.setdefault(last, {}), value)
        else:
            inner[last] = value


@dataclass
class _Reader:
    """Converts tables of a TOML file to dataclasses. Each error names the file and the key."""

    path: Path

    def error(self, name: str, problem: str) -> RecipeError:
        return RecipeError(f"{self.path}: {name}: {problem}")

    def build(self, kind: type, table: dict[str, Any], prefix: str) -> Any:
        types_of = typing.get_type_hints(kind)
        for key in table:
            if key not in types_of:
                near = difflib.get_close_matches(key, types_of, n=1)
                hint = f"did you mean {prefix}{near[0]}?" if near else f"the keys are {', '.join(types_of)}"
                raise self.error(prefix + key, f"is not a key of recipes; {hint}")
        values = {}
        for entry in fields(kind):
            if entry.name in table:
                values[entry.name] = self.value(types_of[entry.name], table[entry.name], prefix + entry.name)
            elif entry.default is MISSING and entry.default_factory is MISSING:
                raise self.error(prefix + entry.name, "is missing, but required")
        return kind(**values)

    def value(self, kind: Any, value: Any, name: str) -> Any:
        if typing.get_origin(kind) is types.UnionType:  # optional values
            kind = next(option for option in typing.get_args(kind) if option is not type(None))
        if is_dataclass(kind):
            if not isinstance(value, dict):
                raise self.error(name, f"has to be a table, not {value!r}")
            return self.build(typing.cast(type, kind), value, f"{name}.")
        if typing.get_origin(kind) is Literal:
            options = typing.get_args(kind)
            if not any(type(value) is type(option) and value == option for option in options):  # True is not 1
                allowed = ", ".join(str(each).lower() if isinstance(each, bool) else repr(each) for each in options)
                raise self.error(name, f"has to be one of {allowed}, not {value!r}")
            return value
        if typing.get_origin(kind) is tuple:
            inner = typing.get_args(kind)[0]
            items = value if isinstance(value, (list, tuple)) else [value]
            if is_dataclass(inner):  # a source may be only a path
                items = [item if isinstance(item, dict) else {"source": item} for item in items]
            return tuple(self.value(inner, item, name) for item in items)
        if kind is bool:
            if not isinstance(value, bool):
                raise self.error(name, f"has to be true or false, not {value!r}")
            return value
        if kind is Path:
            if not isinstance(value, (str, Path)) or not str(value):
                raise self.error(name, f"has to be a path, not {value!r}")
            return value.absolute() if isinstance(value, Path) else self.path.absolute().parent / value
        if kind is str and isinstance(value, Path):
            return str(value.absolute())
        if kind is bool:
            if not isinstance(value, bool):
                raise self.error(name, f"has to be true or false, not {value!r}")
            return value
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) < 2**63 else math.inf
        if not isinstance(value, kind) or isinstance(value, bool):
            kinds = {int: "a whole number", float: "a number", str: "a text"}
            raise self.error(name, f"has to be {kinds[kind]}, not {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise self.error(name, f"has to be a finite number, not {value}")
        if isinstance(value, int) and value >= 2**63:
            raise self.error(name, f"has to be less than 2^63, not {value}")
        return value
