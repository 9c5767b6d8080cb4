"""What can be known of a training before a weight is read: each thing that does not fit is told in its own words."""

from __future__ import annotations

import difflib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from blip2 import checkpoint
from blip2.checkpoint import BUNDLED, QFORMER_TOKENIZER, ImageSettings
from blip2.checkpoint.bounds import LARGEST_IMAGE
from blip2.checkpoint.quantize import quantization_in
from blip2.config import Blip2Config, MatcherConfig
from blip2.data import Row, read_rows
from blip2.data.cleaning import cleaned
from blip2.data.coding import Coding
from blip2.data.joined import Joined
from blip2.errors import CheckpointError, RecipeError
from blip2.model import Blip2, Blip2Matcher
from blip2.published import PUBLISHED
from blip2.text import Tokenizer
from blip2.train import trackers
from blip2.train.recipes import DataRecipe, EvaluationRecipe, Recipe
from blip2.train.sources import Tell, open_sources
from blip2.train.texts import TextSource


@dataclass(frozen=True)
class Materials:
    """All that a training starts from, but the weights."""

    start: Path
    config: Blip2Config | MatcherConfig
    """Of what is trained: that of ``start``, with the text branch and of the image size that the recipe gives it."""
    tokenizer: Tokenizer
    settings: ImageSettings
    train_rows: list[Row] | Joined
    held_out_rows: list[Row] | Joined | None = None
    """Those of the evaluation; only the first ``evaluation.max_rows`` are used."""
    qformer: Path | None = None
    text_branch: Path | None = None

    @property
    def qformer_tokenizer(self) -> Path | None:
        """Of what the Q-Former reads, if it reads the prompt."""
        if isinstance(self.config, MatcherConfig) or not self.config.reads_prompt:
            return None
        return (self.text_branch or self.start / QFORMER_TOKENIZER) / "tokenizer.json"

    def texts(self, recipe: Recipe) -> TextSource:
        """Stage 2: what is drawn of a row's texts."""
        assert isinstance(self.config, Blip2Config)
        reader = None
        if (path := self.qformer_tokenizer) is not None:
            reader = Tokenizer.from_folder(path.parent), self.config.qformer
        return TextSource(self.tokenizer, self.config.language, recipe.data, reader)


def gather(recipe: Recipe, path: Path, tell: Tell = lambda message: None) -> Materials:
    """Find, read and compare everything that the recipe at ``path`` names. ``tell`` is told what is found in it.

    Raises RecipeError and CheckpointError.
    """
    start = find_model(recipe.start, path, "start")
    config = checkpoint.read_config(start)
    if isinstance(config, MatcherConfig) != (recipe.stage == 1):
        holds, needs = ("matching", "generative") if isinstance(config, MatcherConfig) else ("generative", "matching")
        raise RecipeError(f"{path}: start: {start} holds a {holds} model, stage {recipe.stage} needs a {needs} one")
    if recipe.lora is not None and quantization_in(start) is not None:
        raise RecipeError(
            f"{path}: start: {start} is quantised, and an adapter belongs to the original; name that, and set "
            "lora.base to int8 or int4"
        )
    tokenizer, settings = Tokenizer.from_folder(start), checkpoint.image_settings(start, config)
    qformer = None if recipe.qformer is None else find_model(recipe.qformer, path, "qformer")
    if qformer is not None:
        taken = checkpoint.read_config(qformer)
        if not isinstance(taken, MatcherConfig):
            raise RecipeError(f"qformer: {qformer} holds no matching model; name the result of stage 1")
        if taken.vision != config.vision:
            raise RecipeError(f"qformer: {qformer} was trained on another image encoder than the one of 'start'")
    text_branch = None if recipe.text_branch is None else find_model(recipe.text_branch, path, "text_branch")
    if text_branch is not None:
        assert isinstance(config, Blip2Config)
        config = _with_text_branch(config, text_branch, recipe)
    if recipe.vision is not None and recipe.vision.image_size is not None:
        config, settings = _of_size(config, settings, recipe.vision.image_size)
    _check_model(config, recipe)
    _check_apart(recipe, {"start": start, "qformer": qformer, "text_branch": text_branch})
    trackers.check(recipe.track.to)
    evaluation = recipe.evaluation
    materials = Materials(
        start, config, tokenizer, settings,
        _rows(recipe.data, recipe, path, tell),
        None if evaluation is None else _rows(evaluation, recipe, path, tell),
        qformer,
        text_branch,
    )  # fmt: skip
    _check_rows(materials, recipe)
    _check_pictures(materials, recipe)
    _check_output(materials, recipe)
    return materials


def _rows(data: DataRecipe | EvaluationRecipe, recipe: Recipe, path: Path, tell: Tell) -> list[Row] | Joined:
    change: Callable[[Row], Row] = cleaned if recipe.data.cleaning == "lavis" else lambda row: row
    if not data.sources:
        return list(map(change, read_rows(data.rows, data.images)))
    mix = asdict(recipe.data.mix)
    kinds = ["captions"] if recipe.stage == 1 else [kind for kind, weight in mix.items() if weight > 0]
    folder = path.absolute().parent
    keep = recipe.out / "training" / "rows"
    return open_sources(data.sources, folder, keep=keep, kinds=kinds, tell=tell, change=change)


def find_model(name: str, recipe: Path, key: str) -> Path:
    """A folder beside the recipe, or the bundled or a published model of this name, or one that is in the cache.

    Any other name is taken for a folder that is missing, and is not looked up on the hub.
    """
    beside = recipe.absolute().parent / Path(name).expanduser()
    if beside.is_dir():
        return beside
    if beside.is_file():
        return checkpoint.resolve(beside)  # which says what to do with it
    if name in BUNDLED or name in PUBLISHED:
        return checkpoint.resolve(name)
    try:
        return checkpoint.resolve(name, local_files_only=True)
    except CheckpointError:
        pass
    beyond = [folder.name for folder in beside.parent.iterdir() if folder.is_dir()] if beside.parent.is_dir() else []
    near = difflib.get_close_matches(beside.name, beyond, n=1)
    hint = f"did you mean {beside.with_name(near[0])}? Or " if near else ""
    is_of_the_hub = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    fetch = f"; a model of the hub is fetched first, by blip2 pull {name}" if is_of_the_hub else ""
    raise RecipeError(
        f"{recipe}: {key}: there is no folder {beside}; {hint}name the folder of a model, seen from the recipe's own "
        f"folder, or one of {', '.join(BUNDLED)}{fetch}"
    )


def _with_text_branch(config: Blip2Config, folder: Path, recipe: Recipe) -> Blip2Config:
    taken = checkpoint.read_config(folder)
    if not isinstance(taken, MatcherConfig):
        raise RecipeError(f"text_branch: {folder} holds no matching model; name the result of stage 1")
    if config.reads_prompt:
        raise RecipeError(f"text_branch: {recipe.start} is an InstructBLIP, and has a text branch already; remove it")
    own = taken.qformer
    qformer = replace(
        config.qformer,
        has_text=True,
        vocab_size=own.vocab_size,
        max_position_embeddings=own.max_position_embeddings,
    )
    if differs := [name for name, value in asdict(own).items() if getattr(qformer, name) != value]:
        raise RecipeError(
            f"text_branch: the Q-Former of {folder} has another {' and '.join(differs)} than the one of 'start'; name "
            "the result of stage 1 that it came from"
        )
    return replace(config, qformer=qformer)


def _of_size(
    config: Blip2Config | MatcherConfig, settings: ImageSettings, size: int
) -> tuple[Blip2Config | MatcherConfig, ImageSettings]:
    """The two for pictures of another size."""
    patch = config.vision.patch_size
    if size % patch or size > LARGEST_IMAGE:
        near = sorted({max(patch, size // patch * patch), (size // patch + 1) * patch})
        near = [each for each in near if each <= LARGEST_IMAGE] or [LARGEST_IMAGE // patch * patch]
        raise RecipeError(
            f"vision.image_size: {size} is no multiple of the image encoder's patches of {patch} pixels, or more than "
            f"{LARGEST_IMAGE}; set it to {' or '.join(map(str, near))}"
        )
    edge = None if settings.shortest_edge is None else round(settings.shortest_edge * size / settings.size)
    vision = replace(config.vision, image_size=size)
    return replace(config, vision=vision), replace(settings, size=size, shortest_edge=edge)


def _check_model(config: Blip2Config | MatcherConfig, recipe: Recipe) -> None:
    if isinstance(config, MatcherConfig):
        if not config.has_lm_head:
            raise RecipeError(
                f"start: {recipe.start}: has no temperature and no caption head, which stage 1 trains; published "
                "matching models come without: start from one that was saved by stage 1, or from a new one"
            )
        return
    language, data = config.language, recipe.data
    longest = config.qformer.num_query_tokens + data.max_prompt_tokens + data.max_text_tokens
    if longest > language.max_position_embeddings:
        raise RecipeError(
            f"queries, data.max_prompt_tokens and data.max_text_tokens make {longest} tokens, the language "
            f"model has {language.max_position_embeddings} positions; lower data.max_prompt_tokens"
        )


def _check_rows(materials: Materials, recipe: Recipe) -> None:
    train_rows = materials.train_rows
    num_rows = len(train_rows)
    if isinstance(train_rows, Joined):
        num_rows = min(train_rows.sizes)
    if recipe.optim.batch_size > num_rows:
        size = recipe.optim.batch_size
        raise RecipeError(f"optim.batch_size is {size}, but there are only {num_rows} rows; lower it")
    rows = _listed(materials)
    if isinstance(materials.config, MatcherConfig):
        if (missing := next((row for row in rows if not row.captions), None)) is not None:
            raise RecipeError(f"{missing.image}: its row has no caption, and stage 1 learns from captions")
        for name, some in (("data.rows", materials.train_rows), ("evaluation.rows", materials.held_out_rows)):
            if some is not None and (len(some) if isinstance(some, Joined) else len({row.image for row in some})) < 2:
                raise RecipeError(
                    f"{name} has one picture alone; stage 1 tells pictures from one another: give it two or more"
                )
        if recipe.evaluation is not None and recipe.evaluation.max_rows < 2:
            raise RecipeError(f"evaluation.max_rows is {recipe.evaluation.max_rows}; stage 1 compares 2 rows or more")
        return
    source = materials.texts(recipe)
    if (unusable := next((row for row in rows if not source.can_use(row)), None)) is not None:
        raise RecipeError(f"{unusable.image}: its row has no text of a kind to which data.mix gives weight")


def _listed(materials: Materials) -> list[Row]:
    """The rows that are in memory; those of sources were looked at when they were found."""
    both = (materials.train_rows, materials.held_out_rows or [])
    return [row for rows in both if not isinstance(rows, Joined) for row in rows]


def _check_pictures(materials: Materials, recipe: Recipe) -> None:
    """That they are there. Where features are kept, pictures that were seen may be gone by now."""
    if recipe.data.features is not None and any(recipe.data.features.glob("*.bin")):
        return
    listed = {row.image: None for row in _listed(materials)}
    missing = [image for image in listed if not os.path.exists(image)]
    is_skipped = recipe.data.on_bad_picture == "skip" and len(missing) < len(listed)
    if missing and not is_skipped:
        skip = '; or pass such pictures over: data.on_bad_picture = "skip"' if len(missing) < len(listed) else ""
        raise RecipeError(
            f"{len(missing):,} of {len(listed):,} pictures are not there, the first is {missing[0]}; check "
            f"data.images, from which the rows' paths start (absent: the folder of the rows){skip}"
        )


def _check_apart(recipe: Recipe, sources: dict[str, Path | None]) -> None:
    """That the output is no model that training starts from."""
    for key, source in sources.items():
        if source is not None and recipe.out.resolve() == source.resolve():
            raise RecipeError(f"out: {recipe.out} is the folder of {key!r}, which it would overwrite; name another")


def _check_output(materials: Materials, recipe: Recipe) -> None:
    """That it can be written, and has room for the features."""
    _check_writable("out", recipe.out)
    if (features := recipe.data.features) is None:
        return
    there = _check_writable("data.features", features)
    vision = materials.config.vision
    row_bytes = Coding(recipe.data.features_dtype, vision.num_tokens, vision.hidden_size).row_bytes
    free = shutil.disk_usage(there).free
    if there == features and any(features.iterdir()):
        return  # some may be there already
    count = len({row.image for row in _listed(materials)}) + sum(map(len, _collections(materials, recipe)))
    if count * row_bytes > free:  # but rows of collections may share pictures
        count = _count_pictures(materials, recipe)
    if count * row_bytes > free:
        smaller = "" if recipe.data.features_dtype != "fp16" else ', or set data.features_dtype = "int8"'
        raise RecipeError(
            f"data.features: the features of {count:,} pictures take {count * row_bytes / 1e9:.1f} GB, and {features} "
            f"has room for {free / 1e9:.1f} GB; name another folder{smaller}, or leave it out to compute them at each "
            "step"
        )


def _collections(materials: Materials, recipe: Recipe) -> list[Joined]:
    """Those of which features are kept."""
    held_out = materials.held_out_rows
    if isinstance(held_out, Joined) and recipe.evaluation is not None:
        held_out = held_out.first(recipe.evaluation.max_rows)
    return [rows for rows in (materials.train_rows, held_out) if isinstance(rows, Joined)]


def _count_pictures(materials: Materials, recipe: Recipe) -> int:
    """The distinct ones, each file of a collection looked up."""
    found = {row.image for row in _listed(materials)}
    shared = 0
    for rows in _collections(materials, recipe):
        for path, is_own in map(rows.place, range(len(rows))):
            found |= {path} if is_own else set()
            shared += not is_own
    return len(found) + shared


def _check_writable(key: str, folder: Path) -> Path:
    """Nothing is left behind. Returns the folder, or else the one in which it will be made."""
    there = next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
    try:
        with tempfile.TemporaryFile(dir=there):
            return there
    except OSError as error:
        reason = error.strerror or error
        raise RecipeError(f"{key}: {folder} cannot be written ({reason}); check it, or name another folder") from None


def check_weights(model: Blip2 | Blip2Matcher, names: Sequence[str | None]) -> None:
    """What only the weights tell: that there is something to learn from. ``names`` are those that the model came from.

    Raises RecipeError for queries that are all equal, as new models of other programs have them (all zero), and for a
    temperature that is none.
    """
    whence = next(name for name in reversed(names) if name is not None)
    queries_QD = model.qformer.query_tokens.detach()[0]
    if len(queries_QD) > 1 and torch.equal(queries_QD, queries_QD[:1].expand_as(queries_QD)):
        what = "all zero" if not queries_QD.any() else "all equal"
        raise RecipeError(
            f"{whence}: its query tokens are {what}, as other programs make a new model, and what is equal stays equal "
            "in training; draw them anew: checkpoint.load, model.qformer.query_tokens.data.normal_(std=0.02), "
            "checkpoint.save"
        )
    temperature = getattr(model, "temperature", None)
    if temperature is not None and not temperature.item() > 0:
        raise RecipeError(f"{whence}: its temperature is {temperature.item():g}, and has to be above 0, such as 0.07")
