"""Checks of a training before any weight is read. Each problem has its own error message."""

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
    """Everything that a training starts from, except the weights."""

    start: Path
    config: Blip2Config | MatcherConfig
    """Configuration of the trained model: that of ``start``, with the text branch and the image size of the recipe."""
    tokenizer: Tokenizer
    settings: ImageSettings
    train_rows: list[Row] | Joined
    held_out_rows: list[Row] | Joined | None = None
    """Rows for evaluation; only the first ``evaluation.max_rows`` are used."""
    qformer: Path | None = None
    text_branch: Path | None = None

    @property
    def qformer_tokenizer(self) -> Path | None:
        """Tokenizer of the Q-Former, if the Q-Former reads the prompt."""
        if isinstance(self.config, MatcherConfig) or not self.config.reads_prompt:
            return None
        return (self.text_branch or self.start / QFORMER_TOKENIZER) / "tokenizer.json"

    def texts(self, recipe: Recipe) -> TextSource:
        """Stage 2: draws the texts of a row."""
        assert isinstance(self.config, Blip2Config)
        reader = None
        if (path := self.qformer_tokenizer) is not None:
            reader = Tokenizer.from_folder(path.parent), self.config.qformer
        return TextSource(self.tokenizer, self.config.language, recipe.data, reader)


def gather(recipe: Recipe, path: Path, tell: Tell = lambda message: None) -> Materials:
    """Find, read and compare everything that the recipe at ``path`` names. ``tell`` receives a message about each
    source.

    Raises RecipeError and CheckpointError.
    """
    start = find_model(recipe.start, path, "start")
    config = checkpoint.read_config(start)
    if isinstance(config, MatcherConfig) != (recipe.stage == 1):
        holds, needs = ("matching", "generative") if isinstance(config, MatcherConfig) else ("generative", "matching")
        raise RecipeError(f"{path}: start: {start} is a {holds} model, but stage {recipe.stage} needs a {needs} model")
    if recipe.lora is not None and quantization_in(start) is not None:
        raise RecipeError(
            f"{path}: start: {start} is quantised, but adapters are trained on the original model; name that one and "
            "set lora.base to int8 or int4"
        )
    tokenizer, settings = Tokenizer.from_folder(start), checkpoint.image_settings(start, config)
    qformer = None if recipe.qformer is None else find_model(recipe.qformer, path, "qformer")
    if qformer is not None:
        taken = checkpoint.read_config(qformer)
        if not isinstance(taken, MatcherConfig):
            raise RecipeError(f"qformer: {qformer} is not a matching model; name the result of stage 1")
        if taken.vision != config.vision:
            raise RecipeError(f"qformer: {qformer} was trained with another image encoder than that of 'start'")
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
    _check_images(materials, recipe)
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
    """Resolve a model name: a folder beside the recipe, a bundled or published model, or one that is in the cache.

    Any other name is taken for a missing folder; the hub is not asked.
    """
    local_path = recipe.absolute().parent / Path(name).expanduser()
    if local_path.is_dir():
        return local_path
    if local_path.is_file():
        return checkpoint.resolve(local_path)  # its error says what to do
    if name in BUNDLED or name in PUBLISHED:
        return checkpoint.resolve(name)
    try:
        return checkpoint.resolve(name, local_files_only=True)
    except CheckpointError:
        pass
    parent = local_path.parent
    siblings = [folder.name for folder in parent.iterdir() if folder.is_dir()] if parent.is_dir() else []
    near = difflib.get_close_matches(local_path.name, siblings, n=1)
    hint = f"did you mean {local_path.with_name(near[0])}? Or " if near else ""
    is_of_the_hub = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    fetch = f"; to use a model of the hub, fetch it first: blip2 pull {name}" if is_of_the_hub else ""
    raise RecipeError(
        f"{recipe}: {key}: there is no folder {local_path}; {hint}name the folder of a model, relative to the recipe's "
        f"folder, or one of {', '.join(BUNDLED)}{fetch}"
    )


def _with_text_branch(config: Blip2Config, folder: Path, recipe: Recipe) -> Blip2Config:
    taken = checkpoint.read_config(folder)
    if not isinstance(taken, MatcherConfig):
        raise RecipeError(f"text_branch: {folder} is not a matching model; name the result of stage 1")
    if config.reads_prompt:
        raise RecipeError(f"text_branch: {recipe.start} is an InstructBLIP and already has a text branch; remove this "
            "key")
    own = taken.qformer
    qformer = replace(
        config.qformer,
        has_text=True,
        vocab_size=own.vocab_size,
        max_position_embeddings=own.max_position_embeddings,
    )
    if differs := [name for name, value in asdict(own).items() if getattr(qformer, name) != value]:
        raise RecipeError(
            f"text_branch: the Q-Former of {folder} differs from that of 'start' in {' and '.join(differs)}; name the "
            "result of stage 1 that it was trained from"
        )
    return replace(config, qformer=qformer)


def _of_size(
    config: Blip2Config | MatcherConfig, settings: ImageSettings, size: int
) -> tuple[Blip2Config | MatcherConfig, ImageSettings]:
    """Both configurations for another image size."""
    patch = config.vision.patch_size
    if size % patch or size > LARGEST_IMAGE:
        near = sorted({max(patch, size // patch * patch), (size // patch + 1) * patch})
        near = [each for each in near if each <= LARGEST_IMAGE] or [LARGEST_IMAGE // patch * patch]
        raise RecipeError(
            f"vision.image_size: {size} is not a multiple of the patch size ({patch} pixels) of the image encoder, or "
            f"is more than {LARGEST_IMAGE}; set it to {' or '.join(map(str, near))}"
        )
    edge = None if settings.shortest_edge is None else round(settings.shortest_edge * size / settings.size)
    vision = replace(config.vision, image_size=size)
    return replace(config, vision=vision), replace(settings, size=size, shortest_edge=edge)


def _check_model(config: Blip2Config | MatcherConfig, recipe: Recipe) -> None:
    if isinstance(config, MatcherConfig):
        if not config.has_lm_head:
            raise RecipeError(
                f"start: {recipe.start}: has no temperature and no caption head, which stage 1 trains; published "
                "matching models lack both: start from a model that stage 1 has saved, or from a new one"
            )
        return
    language, data = config.language, recipe.data
    longest = config.qformer.num_query_tokens + data.max_prompt_tokens + data.max_text_tokens
    if longest > language.max_position_embeddings:
        raise RecipeError(
            f"query tokens, data.max_prompt_tokens and data.max_text_tokens add up to {longest} tokens, but the "
            f"language model has {language.max_position_embeddings} positions; lower data.max_prompt_tokens"
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
            raise RecipeError(f"{missing.image}: this row has no caption, which stage 1 needs")
        for name, some in (("data.rows", materials.train_rows), ("evaluation.rows", materials.held_out_rows)):
            if some is not None and (len(some) if isinstance(some, Joined) else len({row.image for row in some})) < 2:
                raise RecipeError(
                    f"{name} has only one image; stage 1 compares images with each other and needs two or more"
                )
        if recipe.evaluation is not None and recipe.evaluation.max_rows < 2:
            raise RecipeError(f"evaluation.max_rows is {recipe.evaluation.max_rows}; stage 1 compares rows with each "
                "other and needs 2 or more")
        return
    source = materials.texts(recipe)
    if (unusable := next((row for row in rows if not source.can_use(row)), None)) is not None:
        raise RecipeError(f"{unusable.image}: this row has no text of a kind with a weight above 0 in data.mix")


def _listed(materials: Materials) -> list[Row]:
    """The rows that are in memory. Rows of sources were checked when they were found."""
    both = (materials.train_rows, materials.held_out_rows or [])
    return [row for rows in both if not isinstance(rows, Joined) for row in rows]


def _check_images(materials: Materials, recipe: Recipe) -> None:
    """Check that the image files exist. With kept features, images that were already encoded may be missing."""
    if recipe.data.features is not None and any(recipe.data.features.glob("*.bin")):
        return
    listed = {row.image: None for row in _listed(materials)}
    missing = [image for image in listed if not os.path.exists(image)]
    is_skipped = recipe.data.on_bad_picture == "skip" and len(missing) < len(listed)
    if missing and not is_skipped:
        skip = '; or skip such images: data.on_bad_picture = "skip"' if len(missing) < len(listed) else ""
        raise RecipeError(
            f"{len(missing):,} of {len(listed):,} images do not exist, the first is {missing[0]}; check data.images, "
            f"the folder that the rows' paths are relative to (default: the folder of the rows){skip}"
        )


def _check_apart(recipe: Recipe, sources: dict[str, Path | None]) -> None:
    """Check that the output folder is not a model that training starts from."""
    for key, source in sources.items():
        if source is not None and recipe.out.resolve() == source.resolve():
            raise RecipeError(f"out: {recipe.out} is also the folder of {key!r}, which would be overwritten; name "
                "another folder")


def _check_output(materials: Materials, recipe: Recipe) -> None:
    """Check that the output folder is writable, and that the features fit on the disk."""
    _check_writable("out", recipe.out)
    if (features := recipe.data.features) is None:
        return
    there = _check_writable("data.features", features)
    vision = materials.config.vision
    row_bytes = Coding(recipe.data.features_dtype, vision.num_tokens, vision.hidden_size).row_bytes
    free = shutil.disk_usage(there).free
    if there == features and any(features.iterdir()):
        return  # some may exist already
    count = len({row.image for row in _listed(materials)}) + sum(map(len, _collections(materials, recipe)))
    if count * row_bytes > free:  # but rows of collections may share images
        count = _count_images(materials, recipe)
    if count * row_bytes > free:
        smaller = "" if recipe.data.features_dtype != "fp16" else ', or set data.features_dtype = "int8"'
        raise RecipeError(
            f"data.features: the features of {count:,} images take {count * row_bytes / 1e9:.1f} GB, but {features} "
            f"has only {free / 1e9:.1f} GB free; name another folder{smaller}, or remove this key to compute the "
            "features at each step"
        )


def _collections(materials: Materials, recipe: Recipe) -> list[Joined]:
    """The collections whose features are kept."""
    held_out = materials.held_out_rows
    if isinstance(held_out, Joined) and recipe.evaluation is not None:
        held_out = held_out.first(recipe.evaluation.max_rows)
    return [rows for rows in (materials.train_rows, held_out) if isinstance(rows, Joined)]


def _count_images(materials: Materials, recipe: Recipe) -> int:
    """Number of distinct images. Looks up each file of a collection."""
    found = {row.image for row in _listed(materials)}
    shared = 0
    for rows in _collections(materials, recipe):
        for path, is_own in map(rows.place, range(len(rows))):
            found |= {path} if is_own else set()
            shared += not is_own
    return len(found) + shared


def _check_writable(key: str, folder: Path) -> Path:
    """Check that a folder is writable, without leaving anything behind. Returns the folder, or the existing parent in
    which it will be made."""
    there = next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
    try:
        with tempfile.TemporaryFile(dir=there):
            return there
    except OSError as error:
        reason = error.strerror or error
        raise RecipeError(f"{key}: {folder} is not writable ({reason}); check it, or name another folder") from None


def check_weights(model: Blip2 | Blip2Matcher, names: Sequence[str | None]) -> None:
    """Checks that need the weights. ``names``: the models that ``model`` was built from.

    Raises RecipeError for query tokens that are all equal (new models of other programs have zeros), and for an invalid
    temperature.
    """
    source_name = next(name for name in reversed(names) if name is not None)
    queries_QD = model.qformer.query_tokens.detach()[0]
    if len(queries_QD) > 1 and torch.equal(queries_QD, queries_QD[:1].expand_as(queries_QD)):
        what = "all zero" if not queries_QD.any() else "all equal"
        raise RecipeError(
            f"{source_name}: its query tokens are {what}, as in new models of other programs, and training cannot make "
            "equal tokens different; initialise them: checkpoint.load, "
            "model.qformer.query_tokens.data.normal_(std=0.02), checkpoint.save"
        )
    temperature = getattr(model, "temperature", None)
    if temperature is not None and not temperature.item() > 0:
        given = f"{temperature.item():g}"
        raise RecipeError(f"{source_name}: its temperature is {given}; it has to be above 0, such as 0.07")
