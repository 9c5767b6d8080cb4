"""Starts an evaluation, which collects a model's outputs like any other collection."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blip2.api.collect import asking, captioning
from blip2.collection.summary import OnResults
from blip2.config import MatcherConfig
from blip2.errors import CheckpointError, OptionError, option
from blip2.evaluate import matching
from blip2.evaluate.benchmark import ASK, CAPTION, CHOOSE, MATCHING, RETRIEVAL, RETRIEVE
from blip2.evaluate.benchmarks import BENCHMARKS
from blip2.evaluate.evaluation import WHERE, Evaluation
from blip2.evaluate.examples import ANSWERS, read
from blip2.evaluate.prepare import prepare
from blip2.evaluate.protocol import config_of, facts_of
from blip2.evaluate.robust import ROBUSTNESS, Robustness, vary
from blip2.scores import VQA_RULES


def evaluating(
    rows: Path, folder: Path, *, rule: str | None = None, question_prompt: str | None = None, **options: Any
) -> Evaluation:
    """Check everything that can be checked without the model. ``options``: those of `blip2.caption_collection` or
    `blip2.ask_collection`: ``model``, decoding, ``limit``, ``shard``, ... With a matching model, rows with captions are
    a retrieval, where ``candidates`` pairs are reranked for each image and text. ``question_prompt``: template of
    questions, "Question: {} Answer:", instead of the model's own.

    Raises CollectionError with file and line for an unusable row, OptionError, CheckpointError.
    """
    rule = _checked_rule(rule or "official")
    examples = read(rows)
    has_questions = examples[0].question is not None
    if question_prompt is not None:
        _check_question_prompt("question_prompt", question_prompt, has_questions, rows)
    if has_questions and options.get("prompt") is not None:
        raise OptionError(f"{option('prompt')} is for captions, but {rows} has questions; use "
            f"{option('question_prompt')}")  # fmt: skip
    is_matching = _matches(options.get("model"), options.get("revision"))
    if is_matching and has_questions:
        raise OptionError(f"{rows}: has questions, which a matching model cannot answer; name another model with "
            f"{option('model')}")  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    if is_matching:
        candidates = options.pop("candidates", RETRIEVAL.candidates)
        run, nearest = matching.beginning(RETRIEVE, examples, rows, folder, candidates, **options)
        return Evaluation(rows, examples, rule, folder, run, nearest=nearest)
    where = {**WHERE, "output": folder / ANSWERS, **options}
    if has_questions:
        run = asking(rows, question_column="question", wording=question_prompt or "", **where)
    else:
        run = captioning(rows, if_exists="overwrite", **where)
    return Evaluation(rows, examples, rule, folder, run)


def benchmarking(
    name: str,
    data: Path,
    folder: Path,
    *,
    protocol: str = "paper",
    rule: str | None = None,
    first: int | None = None,
    question_prompt: str | None = None,
    **options: Any,
) -> Evaluation:
    """As `evaluating`, for one of `BENCHMARKS`, whose files are anywhere in the folder ``data``. ``protocol``: whose
    prompts, lengths and beams to use, see `benchmark.Settings`; ``options`` override them. ``first``: only this many
    rows. ``question_prompt``: the ``prompt`` of a benchmark with questions.

    Raises CollectionError, which says where to get missing files, RecipeError, CheckpointError, OptionError.
    """
    if name not in BENCHMARKS:
        raise OptionError(f"there is no benchmark {name}; there are {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    if protocol not in benchmark.settings:
        raise OptionError(f"{option('protocol')} is {protocol!r}; it may be {', '.join(benchmark.settings)}")
    if first is not None and first < 1:
        raise OptionError(f"{option('first')} is {first}; give 1 or more, or leave it out")
    has_questions = benchmark.task in (ASK, CHOOSE)
    if question_prompt is not None:
        _check_question_prompt("question_prompt", question_prompt, has_questions, name)
        if options.get("prompt") is not None:
            raise OptionError(f"{option('prompt')} and {option('question_prompt')} mean the same for {name}; leave one "
                "out")
        options["prompt"] = question_prompt
    elif has_questions and options.get("prompt"):
        _check_question_prompt("prompt", options["prompt"], has_questions, name)
    facts = facts_of(name, protocol, options, rule)
    prepared = prepare(name, benchmark, data, folder, first)
    examples, facts = read(prepared.rows), facts.with_notes(prepared.notes)
    rule = _checked_rule(rule or facts.settings.rule)
    if benchmark.task in MATCHING:
        number = facts.settings.candidates
        run, nearest = matching.beginning(benchmark.task, examples, prepared.rows, folder, number, **options)
        return Evaluation(prepared.rows, examples, rule, folder, run, benchmark, facts, nearest)
    if (prompt := options.pop("prompt", None)) is None:
        prompt = facts.prompt
    given = {**WHERE, "output": folder / ANSWERS, **facts.decoding, **options}
    if benchmark.task == CAPTION:
        run = captioning(prepared.rows, if_exists="overwrite", prompt=prompt, **given)
    else:
        chosen = "choices" if benchmark.task == CHOOSE else ""
        run = asking(prepared.rows, question_column="question", choices_column=chosen, wording=prompt, **given)
    return Evaluation(prepared.rows, examples, rule, folder, run, benchmark, facts)


def varying(data: Path, folder: Path, *, first: int | None = None, **options: Any) -> Robustness:
    """As `evaluating`, for rows of your own in the file ``data``, unchanged and varied. ``first``: only this many.

    Raises CollectionError, CheckpointError, OptionError.
    """
    if first is not None and first < 1:
        raise OptionError(f"{option('first')} is {first}; give 1 or more, or leave it out")
    if "protocol" in options:
        raise OptionError(f"{option('protocol')} is for benchmarks with published scores; leave it out")
    model = options.get("model")
    if _matches(model, options.get("revision")):
        raise OptionError(f"{ROBUSTNESS} needs a generative model; name one with {option('model')}")
    varied = vary(data, folder, first)
    begun = evaluating(varied.rows, folder, **options)
    name = "miniature" if model is None else str(getattr(model, "name", model))
    return Robustness(
        begun.rows, begun.examples, begun.rule, folder, begun.run, varied=varied, data=data, model=name
    )


def evaluate(
    rows: str | Path,
    folder: str | Path,
    *,
    data: str | Path | None = None,
    against: str | Path | None = None,
    on_results: OnResults = lambda summary, results: None,
    **options: Any,
) -> dict[str, Any]:
    """Ask a model about all rows and compare: ``scores`` with 95 % intervals, ``types`` of questions, and with
    ``against`` the changes. See `evaluating` for options and errors.

        evaluate("questions.jsonl", "scores/")
        evaluate("vqav2", "scores/", data="datasets/", model="Salesforce/blip2-opt-2.7b")

    ``rows``: a file of rows, or the name of a benchmark. A benchmark needs ``data``, the folder of its files, and takes
    the options of `benchmarking`. "robustness" takes a file of rows as ``data``, and the options of `varying`.
    """
    evaluation = begun(str(rows), None if data is None else Path(data), Path(folder), options)
    evaluation.see()
    evaluation.run.run(on_results)
    return evaluation.scores(None if against is None else Path(against))


def begun(rows: str, data: Path | None, folder: Path, options: Mapping[str, Any]) -> Evaluation:
    """`benchmarking` for the name of a benchmark, `varying` for "robustness", else `evaluating`. Raises their
    errors."""
    if rows == ROBUSTNESS:
        if data is None:
            raise OptionError(f"{ROBUSTNESS} needs rows of your own; name their file with {option('data')}")
        return varying(data, folder, **options)
    if rows in BENCHMARKS:
        return benchmarking(rows, data or Path("."), folder, **options)
    if data is not None:
        raise OptionError(f"{option('data')} is for a benchmark, but {rows} is none of {', '.join(BENCHMARKS)}")
    near = difflib.get_close_matches(rows, BENCHMARKS, n=1)
    if near and not Path(rows).exists():
        raise OptionError(f"{rows}: is neither a file nor a benchmark; did you mean {near[0]}?")
    for name in ("protocol", "first"):
        if name in options:
            raise OptionError(f"{option(name)} is for a benchmark, but {rows} is none of {', '.join(BENCHMARKS)}")
    return evaluating(Path(rows), folder, **options)


def _matches(model: Any, revision: str | None) -> bool:
    try:
        return isinstance(config_of(model, revision, local_files_only=True), MatcherConfig)
    except CheckpointError:  # reported when the model is loaded
        return False


def _check_question_prompt(name: str, prompt: str, has_questions: bool, of: object) -> None:
    if not has_questions:
        raise OptionError(f"{option(name)} is for questions, but {of} has none; leave it out")
    if prompt.count("{}") != 1:
        raise OptionError(f"{option(name)} is {prompt!r}; write {{}} once, where the question goes")


def _checked_rule(rule: str) -> str:
    if rule not in VQA_RULES:
        raise OptionError(f"{option('rule')} is {rule!r}; it may be {', '.join(VQA_RULES)}")
    return rule
