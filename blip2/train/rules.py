"""Checks of a recipe's values, alone and in combination."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from blip2.errors import RecipeError
from blip2.train.trackers import NAMES

if TYPE_CHECKING:
    from blip2.train.recipes import LoraRecipe, Recipe, VisionRecipe

Error = Callable[[str, str], RecipeError]
"""From a key and a problem to an error."""
MAX_THREADS = 1024  # with far more, OpenMP ends the program


def check(recipe: Recipe, error: Error) -> None:
    """Checks beyond the types."""
    data, optim, mix = recipe.data, recipe.optim, recipe.data.mix
    least = {
        "optim.steps": (optim.steps, 1),
        "optim.batch_size": (optim.batch_size, 2 if recipe.stage == 1 else 1),
        "optim.accumulate": (optim.accumulate, 1),
        "optim.warmup_steps": (optim.warmup_steps, 0),
        "optim.peak_lr": (optim.peak_lr, 0),
        "optim.min_lr": (optim.min_lr, 0),
        "optim.weight_decay": (optim.weight_decay, 0),
        "optim.clip": (optim.clip, 0),
        "data.max_text_tokens": (data.max_text_tokens, 3),
        "data.max_prompt_tokens": (data.max_prompt_tokens, 8),
        "data.texts_per_image": (data.texts_per_image, 1),
        "data.mix.captions": (mix.captions, 0),
        "data.mix.questions": (mix.questions, 0),
        "data.mix.dialogues": (mix.dialogues, 0),
        "log_every": (recipe.log_every, 1),
        "evaluate_every": (recipe.evaluate_every, 1),
        "checkpoint_every": (recipe.checkpoint_every, 1),
        "sample_every": (recipe.sample_every, 0),
        "seed": (recipe.seed, 0),
        "threads": (recipe.threads, 0),
    }
    if recipe.evaluation is not None:
        least["evaluation.max_rows"] = (recipe.evaluation.max_rows, 1)
    for name, (value, bound) in least.items():
        if value < bound:
            is_pair = name == "optim.batch_size" and recipe.stage == 1
            why = "; a single pair has no negatives" if is_pair else ""
            raise error(name, f"has to be at least {bound}, not {value}{why}")
    if recipe.threads > MAX_THREADS:
        raise error("threads", f"has to be at most {MAX_THREADS}, not {recipe.threads}; 0 uses all cores")
    if optim.accumulate > optim.batch_size:
        raise error("optim.accumulate", f"has to be at most optim.batch_size, which is {optim.batch_size}; lower it")
    for name, value in (
        ("beta1", optim.beta1),
        ("beta2", optim.beta2),
        ("label_smoothing", optim.label_smoothing),
        ("ema", optim.ema),
    ):
        if not 0 <= value < 1:
            raise error(f"optim.{name}", f"has to be at least 0 and less than 1, not {value}")
    if recipe.stage == 1:
        for name, given in (
            ("qformer", recipe.qformer is not None),
            ("text_branch", recipe.text_branch is not None),
            ("data.texts_per_image", data.texts_per_image != 1),
            ("data.caption_prompt", data.caption_prompt != ""),
            ("data.question_prompt", data.question_prompt != ""),
        ):
            if given:
                raise error(name, "belongs to stage 2, but this recipe is for stage 1; remove it")
    else:
        for name, given in (("itc", optim.itc != "exact"), ("itm", not optim.itm), ("itg", not optim.itg)):
            if given:
                raise error(f"optim.{name}", "belongs to stage 1, but this recipe is for stage 2; remove it")
        if mix.captions + mix.questions + mix.dialogues == 0:
            raise error("data.mix", "all kinds of text have the weight 0; give at least one a weight above 0")
        if (prompt := data.question_prompt) and prompt.count("{}") != 1:
            raise error("data.question_prompt", f"has to contain {{}} exactly once, in place of the question, not "
                f"{prompt!r}")
    for key, of in (("data", data), ("evaluation", recipe.evaluation)):
        if of is None:
            continue
        if not of.rows and not of.sources:
            problem = f"is missing or empty; name a file of rows, or a collection as {key}.sources"
            raise error(f"{key}.rows", problem)
        if of.rows and of.sources:
            raise error(f"{key}.sources", f"cannot be combined with {key}.rows; remove one of them")
        if of.sources and of.images is not None:
            raise error(f"{key}.images", "belongs to rows; a source has an 'images' key of its own")
        for source in of.sources:
            if not source.source or not all(source.source):
                raise error(f"{key}.sources", "has a source without a path")
            if not source.weight > 0:
                raise error(f"{key}.sources.weight", f"has to be above 0, not {source.weight}; or remove it")
            if (source.question is None) != (source.answer is None):
                raise error(f"{key}.sources", "needs both 'question' and 'answer'; name both columns")
    if trains_vision(recipe) and data.features is not None:
        raise error("data.features", "needs a frozen image encoder, but this recipe trains it; remove it")
    if data.features_dtype != "fp16" and data.features is None:
        raise error("data.features_dtype", "applies to features on the disk; name a folder as data.features, or "
            "remove it")
    if data.augment and data.features is not None:
        raise error(
            "data.augment", "crops images differently at each step, but data.features keeps features of whole images; "
                "remove one of them"
        )  # fmt: skip
    if recipe.vision is not None:
        _check_vision(recipe.vision, error)
    if recipe.lora is not None:
        _check_lora(recipe, recipe.lora, error)
    for part in recipe.checkpoint_activations:
        known = ("vision", "qformer") if recipe.stage == 1 else ("vision", "qformer", "language")
        if part not in known:
            raise error("checkpoint_activations", f"names {part!r}; stage {recipe.stage} has {', '.join(known)}")
        if part == "vision" and not trains_vision(recipe):
            raise error("checkpoint_activations", "names the image encoder, which is frozen and has no backward pass; "
                "remove it")
    if recipe.sample_every and recipe.evaluation is None:
        raise error("sample_every", "needs held-out rows; add [evaluation], or remove it")
    for name in recipe.track.to:
        if name not in NAMES:
            raise error("track.to", f"names {name!r}; there are {', '.join(NAMES)}")
    _check_shard(recipe, error)
    if not recipe.start:
        raise error("start", 'is empty; name the folder of a model, or "miniature"')


def trains_vision(recipe: Recipe) -> bool:
    """Whether the image encoder has a gradient: it is trained whole or by adapters."""
    if recipe.vision is not None and recipe.vision.learns:
        return True
    return recipe.lora is not None and "vision" in recipe.lora.parts


def _check_shard(recipe: Recipe, error: Error) -> None:
    known = ("vision",) if recipe.stage == 1 else ("vision", "language")
    for part in recipe.shard:
        if part not in known:
            raise error("shard", f"names {part!r}; stage {recipe.stage} has {', '.join(known)}")
    if "language" in recipe.shard and recipe.lora is not None and recipe.lora.base in ("int8", "int4"):
        raise error("shard", f"cannot shard a language model in {recipe.lora.base}; remove it, or lora.base")
    if "vision" in recipe.shard and recipe.data.features is not None:
        raise error(
            "shard", "names the image encoder, which with data.features runs only once, before training; remove one "
                "of them"
        )


def _check_vision(vision: VisionRecipe, error: Error) -> None:
    if not 0 < vision.layer_decay <= 1:
        raise error("vision.layer_decay", f"has to be above 0 and at most 1, not {vision.layer_decay}")
    if vision.layer_decay != 1 and not vision.learns:
        raise error("vision.layer_decay", "needs a trained image encoder; set vision.learns, or remove it")
    if vision.image_size is not None and vision.image_size < 1:
        raise error("vision.image_size", f"has to be at least 1, not {vision.image_size}")


def _check_lora(recipe: Recipe, lora: LoraRecipe, error: Error) -> None:
    known = ("vision", "qformer") if recipe.stage == 1 else ("vision", "qformer", "language")
    for part in lora.parts or [""]:
        if part not in known:
            raise error("lora.parts", f"names {part!r}; stage {recipe.stage} has {', '.join(known)}")
    for name, is_wrong, wanted in (
        ("rank", lora.rank < 1, f"at least 1, not {lora.rank}"),
        ("alpha", lora.alpha <= 0, f"above 0, not {lora.alpha}"),
        ("dropout", not 0 <= lora.dropout < 1, f"at least 0 and less than 1, not {lora.dropout}"),
    ):
        if is_wrong:
            raise error(f"lora.{name}", f"has to be {wanted}")
    if lora.base in ("int8", "int4") and recipe.stage == 1:
        raise error("lora.base", f"{lora.base} applies to the language model, which stage 1 does not have; use bf16")
    if lora.trains_qformer and "qformer" in lora.parts:
        raise error("lora.trains_qformer", "the Q-Former would be trained both whole and by adapters; remove one of "
            "them")
    if recipe.qformer is not None and not lora.trains_qformer:
        raise error(
            "qformer", "cannot be combined with adapters, which belong to the unchanged model of 'start'; set "
                "lora.trains_qformer, or first make a model with this Q-Former"
        )  # fmt: skip
    for name, is_given in (
        ("vision.learns", recipe.vision is not None and recipe.vision.learns),
        ("vision.image_size", recipe.vision is not None and recipe.vision.image_size is not None),
        ("text_branch", recipe.text_branch is not None),
    ):
        if is_given:
            raise error(name, "changes the model that the adapters belong to, but only the adapters are saved; remove "
                "this key, or [lora]")
