"""A training recipe: a TOML file, read into frozen dataclasses. What it does not know, it refuses.

Paths are meant from the recipe's own folder. The defaults are the paper's where it gives them (section 3.4).
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
    """Stage 2: how often each kind of text is drawn, relative to the others; a row may lack a kind."""

    captions: float = 1.0
    questions: float = 1.0
    dialogues: float = 1.0


@dataclass(frozen=True)
class SourceRecipe:
    """A collection: a folder, shards, parquet, JSON lines, COCO's files. ``data = "shards/{00000..00009}.tar"`` is one
    by itself, ``[[data]]`` one of several."""

    source: tuple[str, ...]
    """Paths, or patterns."""
    weight: float = 1.0
    """Its share of the steps, relative to the others'."""
    images: Path | None = None
    """Where paths in rows start; absent: the folder of the rows."""
    image: str | None = None
    """The column, or the field of a shard, that holds the picture; absent: found by looking."""
    text: str | None = None
    """That of the captions; absent: found by looking."""
    question: str | None = None
    answer: str | None = None
    """Those of a question and its answer, or answers."""
    split: str | None = None
    """Of Karpathy's files."""


@dataclass(frozen=True)
class DataRecipe:
    rows: tuple[Path, ...] = ()
    """JSON-lines files."""
    sources: tuple[SourceRecipe, ...] = ()
    """In the place of rows: collections, which are read from where they lie."""
    images: Path | None = None
    """Where the rows' relative picture paths start; absent: the folder of each file of rows."""
    features: Path | None = None
    """A folder for the frozen image encoder's output, computed once; absent: computed at every step."""
    features_dtype: Literal["fp16", "int8", "fp8"] = "fp16"
    """How they are stored: in half precision, or in about half of that, rounded, each token with a scale of its own
    ("int8", or "fp8", which is e4m3)."""
    augment: Literal[False, True, "randaugment"] = False
    """At each step another part of a picture, half of it at least, mirrored as often as not; "randaugment" changes
    that further, as the authors' library does when fine-tuning (see `image.randaugment`). Not with ``features``, which
    are those of whole pictures."""
    cleaning: Literal["none", "lavis"] = "none"
    """Captions and questions in small letters and without most signs, as the authors' library has them."""
    on_bad_picture: Literal["skip", "stop"] = "skip"
    """A picture that cannot be read: its row gives its place to the next one whose can be, and the log names it; or
    its error ends the training, with its state saved."""
    max_text_tokens: int = 32
    """Stage 1: of a caption with its [CLS] and [SEP]; stage 2: of a caption or an answer with its end."""
    max_prompt_tokens: int = 128
    """Stage 2: of a question with what was said before it; the oldest turns are left out beyond that."""
    caption_prompt: str = ""
    """Stage 2: what a caption continues; "a photo of" when fine-tuning."""
    question_prompt: str = ""
    """Stage 2: how a question is put, such as "Question: {} Answer:"; absent: as `text.QUESTION_TEMPLATES` has it."""
    texts_per_image: int = 1
    """Stage 2: texts of a row asked in one step; they share one pass of the Q-Former, unless that reads them."""
    mix: MixRecipe = field(default_factory=MixRecipe)


@dataclass(frozen=True)
class OptimRecipe:
    steps: int
    batch_size: int
    """Images a step, of all processes together."""
    accumulate: int = 1
    """A process computes its share of a batch in so many parts, one after the other: the same losses and gradients in
    less memory. Stage 1 computes the vectors that ITC compares twice then."""
    peak_lr: float = 1e-4
    min_lr: float = 1e-5
    warmup_steps: int = 2000
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.05
    clip: float = 0.0
    """Largest norm of the gradient; 0 does not clip, as in the paper."""
    ema: float = 0.0
    """How much of the average of what learns stays at a step, such as 0.999; the average is evaluated and exported.
    0: none."""
    label_smoothing: float = 0.1
    """Stage 1, ITC and ITG."""
    itc: Literal["exact", "lavis"] = "exact"
    """Stage 1: "lavis" has the gradient of the authors' code on several devices, which is about half of ITC's."""
    itg: bool = True
    """Stage 1: whether the Q-Former also learns to caption; without, contrast and matching alone are learnt."""


@dataclass(frozen=True)
class VisionRecipe:
    """What becomes of the image encoder, which is frozen and as it is without this."""

    learns: bool = False
    """Whether it learns, too: in fp32, and not with ``data.features``, which are those of a frozen one."""
    layer_decay: float = 1.0
    """The learning rate of each of its blocks, as a part of that of the next one; the last block's is this part of that
    of all else (Clark et al. 2020). 1: all learn alike."""
    image_size: int | None = None
    """The side of its pictures in pixels; absent: as in ``start``. Its positions are interpolated."""


@dataclass(frozen=True)
class LoraRecipe:
    """Adapters learn, and all that they stand beside is frozen (see `train.lora`)."""

    parts: tuple[str, ...] = ("language",)
    """Of "language", "qformer" and "vision": where the adapters are."""
    targets: tuple[str, ...] = ()
    """Products by their names in the published files, or the ends of these ("q_proj"); absent: all in the layers."""
    rank: int = 16
    alpha: float = 32.0
    """The sum is scaled by alpha / rank, or (``rslora``) by alpha / sqrt(rank)."""
    dropout: float = 0.05
    """Of what an adapter reads."""
    rslora: bool = False
    base: Literal["auto", "fp32", "bf16", "int8", "int4"] = "auto"
    """What the frozen parts are kept in, the language model alone in int8 and int4; "auto": as without adapters."""
    trains_qformer: bool = False
    """Whether Q-Former and projection learn beside the adapters; they are saved with them, whole."""


@dataclass(frozen=True)
class EvaluationRecipe:
    rows: tuple[Path, ...] = ()
    sources: tuple[SourceRecipe, ...] = ()
    images: Path | None = None
    max_rows: int = 1024


@dataclass(frozen=True)
class TrackRecipe:
    """Who else is told how the training goes, see `train.trackers`."""

    to: tuple[str, ...] = ()
    """Of "tensorboard", "trackio" and "wandb"."""
    project: str = "blip2"
    """The name under which trackio and wandb show trainings; the training's own is that of its folder."""


@dataclass(frozen=True)
class Recipe:
    stage: Literal[1, 2]
    start: str
    """The model that training starts from: a folder in the published layout, the name of a bundled or published model,
    or that of one on the hub that was fetched before (``blip2 pull``)."""
    out: Path
    """A folder for the finished model; the log and the state of training lie in it as well."""
    data: DataRecipe
    optim: OptimRecipe
    qformer: str | None = None
    """Stage 2: the result of stage 1, of which the Q-Former is taken; absent: the one of ``start``."""
    text_branch: str | None = None
    """Stage 2: the result of stage 1, of which the Q-Former's text branch is taken, so that it reads the prompt beside
    the picture: what is saved is an InstructBLIP. Absent: it reads the prompt if ``start`` is one."""
    vision: VisionRecipe | None = None
    evaluation: EvaluationRecipe | None = None
    lora: LoraRecipe | None = None
    track: TrackRecipe = field(default_factory=TrackRecipe)
    seed: int = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    device: str = "auto"
    checkpoint_activations: tuple[str, ...] = ()
    """Of "language", "qformer" and "vision": what their layers compute is computed again for the gradient, not kept."""
    shard: tuple[str, ...] = ()
    """Of "language" and "vision": of their weights each of several processes keeps a share (see `train.shard`)."""
    threads: int = 0
    """For the arithmetic, and as many for decoding pictures; 0: as many as there are cores."""
    log_every: int = 10
    evaluate_every: int = 1000
    checkpoint_every: int = 1000
    sample_every: int = 0
    """After each so many steps a page of held-out pictures with what the model says of them; 0: none."""

    @property
    def changes_sight(self) -> bool:
        """Whether the image encoder learns, whole or by adapters."""
        is_adapted = self.lora is not None and "vision" in self.lora.parts
        return is_adapted or (self.vision is not None and self.vision.learns)


def load_recipe(path: Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read a recipe. ``overrides`` replaces values by dotted names ("optim.steps") or nested dictionaries.

    A text that names a path is meant from the recipe's folder; a `Path` in ``overrides`` from the current one.
    Raises RecipeError, one line, for whatever cannot be carried out.
    """
    try:
        table = tomllib.loads(read_text(path))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); name a recipe, a TOML file") from None
    except NotTextError as error:
        raise RecipeError(f"{path}: {error}") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise RecipeError(f"{path}: not TOML ({error}); write a recipe as those in examples/recipes") from None
    _name_sources(table)
    try:
        _override(table, overrides or {})
    except (AttributeError, TypeError):
        names = ", ".join(overrides or {})
        raise RecipeError(f"{path}: {names}: names a key within a value that is no table") from None
    _name_sources(table)
    reader = _Reader(path)
    recipe = reader.build(Recipe, table, "")
    check(recipe, reader.error)
    return recipe


def _name_sources(table: dict[str, Any]) -> None:
    """``data = "a.tar"`` and ``[[data]]`` are short for a table with ``sources``."""
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
    """Tables of a TOML file to dataclasses; every complaint names the file and the key."""

    path: Path

    def error(self, name: str, problem: str) -> RecipeError:
        return RecipeError(f"{self.path}: {name}: {problem}")

    def build(self, kind: type, table: dict[str, Any], prefix: str) -> Any:
        types_of = typing.get_type_hints(kind)
        for key in table:
            if key not in types_of:
                near = difflib.get_close_matches(key, types_of, n=1)
                hint = f"did you mean {prefix}{near[0]}?" if near else f"there are {', '.join(types_of)}"
                raise self.error(prefix + key, f"not a key that a recipe has; {hint}")
        values = {}
        for entry in fields(kind):
            if entry.name in table:
                values[entry.name] = self.value(types_of[entry.name], table[entry.name], prefix + entry.name)
            elif entry.default is MISSING and entry.default_factory is MISSING:
                raise self.error(prefix + entry.name, "is missing, and a recipe needs it")
        return kind(**values)

    def value(self, kind: Any, value: Any, name: str) -> Any:
        if typing.get_origin(kind) is types.UnionType:  # what may be absent
            kind = next(option for option in typing.get_args(kind) if option is not type(None))
        if is_dataclass(kind):
            if not isinstance(value, dict):
                raise self.error(name, f"has to be a table, not {value!r}")
            return self.build(typing.cast(type, kind), value, f"{name}.")
        if typing.get_origin(kind) is Literal:
            options = typing.get_args(kind)
            if not any(type(value) is type(option) and value == option for option in options):  # True is no 1
                allowed = ", ".join(str(each).lower() if isinstance(each, bool) else repr(each) for each in options)
                raise self.error(name, f"has to be one of {allowed}, not {value!r}")
            return value
        if typing.get_origin(kind) is tuple:
            inner = typing.get_args(kind)[0]
            items = value if isinstance(value, (list, tuple)) else [value]
            if is_dataclass(inner):  # a source may be named by its path alone
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
