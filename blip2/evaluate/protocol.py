"""The published score to compare with, and the differences between this evaluation and the published one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from blip2 import checkpoint
from blip2.api.matcher import Matcher
from blip2.api.pipeline import Pipeline
from blip2.config import Blip2Config, MatcherConfig
from blip2.errors import OptionError, option
from blip2.evaluate.benchmark import CAPTION, MATCHING, Benchmark, Settings
from blip2.evaluate.benchmarks import BENCHMARKS
from blip2.published import PUBLISHED
from blip2.tasks.defaults import ASK, NAMES

CHANGES_NUMBERS = ("quantize", "quantize_vision", "vision", "adapter", "chat_template")
"""Loading options that change the model's results."""


@dataclass(frozen=True)
class Facts:
    """``prompt`` and ``decoding``: those of the protocol for this family of language models. ``differences``: one line
    each."""

    name: str
    protocol: str
    settings: Settings
    model: str
    prompt: str
    decoding: Mapping[str, Any]
    differences: tuple[str, ...]

    def with_notes(self, notes: Sequence[str]) -> Facts:
        return replace(self, differences=(*notes, *self.differences))

    def as_dict(self, scores: Mapping[str, Any]) -> dict[str, Any]:
        """For the report. ``published``: the scores of this model, or of all models if it has none."""
        benchmark = BENCHMARKS[self.name]
        found: dict[str, Any] = {
            "benchmark": self.name, "title": benchmark.title, "model": self.model, "protocol": self.protocol,
            "settings": {"prompt": self.prompt, "image_size": self.settings.image_size, **self.decoding},
        }  # fmt: skip
        if (published := benchmark.published.get(self.protocol)) is not None:
            own = {name: dict(each) for name, each in published.scores.items() if name == self.model}
            everyone = {name: dict(each) for name, each in published.scores.items()}
            found["published"] = {"source": published.source, "scores": own or everyone}
        return found | {"differences": [*self.differences]}


def facts_of(name: str, protocol: str, options: Mapping[str, Any], rule: str | None) -> Facts:
    """The facts before anything is loaded. ``options``: all given options. Raises CheckpointError, OptionError."""
    benchmark = BENCHMARKS[name]
    settings = benchmark.settings[protocol]
    model = options.get("model")
    config = config_of(_called(model, benchmark) if model is None else model, options.get("revision"))
    _check(config, benchmark, name)
    family = config.manner if isinstance(config, Blip2Config) else ""
    decoding = settings.decoding_of(family)
    # An InstructBLIP needs an instruction, not the beginning of a caption.
    prompt = "" if family == "instruct" and benchmark.task == CAPTION else settings.prompt
    called = _called(model, benchmark)
    differences = []
    published = benchmark.published.get(protocol)
    if published is not None and called not in published.scores:
        others = ", ".join(each.removeprefix("Salesforce/") for each in published.scores)
        differences.append(f"the model is {called}; the published scores are of {others}")
    if config.vision.image_size != settings.image_size:
        differences.append(f"the image size is {config.vision.image_size} x {config.vision.image_size} pixels, not "
            f"{settings.image_size} x {settings.image_size}")  # fmt: skip
    for key, value in options.items():
        if key in NAMES and value != decoding.get(key, asdict(ASK).get(key)):
            differences.append(f"{key} is {value}, not {decoding.get(key, asdict(ASK).get(key))}")
        elif key in CHANGES_NUMBERS and value:
            differences.append(f"{key} is {value}")
    if options.get("prompt") not in (None, prompt):
        differences.append(f"the prompt is {options['prompt']!r}, not {prompt!r}")
    if rule not in (None, settings.rule):
        differences.append(f"the rule is {rule}, not {settings.rule}")
    if settings.not_done:
        differences.append(settings.not_done)
    return Facts(name, protocol, settings, called, prompt, decoding, tuple(differences))


def _called(model: Any, benchmark: Benchmark) -> str:
    if model is None:
        return "miniature-itm" if benchmark.task in MATCHING else "miniature"
    return str(model.name if isinstance(model, Pipeline | Matcher) else model)


def config_of(
    model: Any, revision: str | None, *, local_files_only: bool = False
) -> Blip2Config | MatcherConfig:
    """The configuration of a loaded model, or by name, "miniature" for None; nothing is loaded. Raises
    CheckpointError."""
    match model:
        case Pipeline():
            return model.speaker.model.config
        case Matcher():
            return model.model.config
    name = str(model or "miniature")
    if name in PUBLISHED and not os.path.isdir(name):
        return PUBLISHED[name].config
    return checkpoint.read_config(checkpoint.resolve(name, revision=revision, local_files_only=local_files_only))


def _check(config: Blip2Config | MatcherConfig, benchmark: Benchmark, name: str) -> None:
    if isinstance(config, MatcherConfig) != (benchmark.task in MATCHING):
        kind = "a matching model" if benchmark.task in MATCHING else "a generative model"
        raise OptionError(f"{name} needs {kind}; name one with {option('model')}")
