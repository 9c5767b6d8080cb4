"""An evaluation: what a model says is collected, as any collection is, and compared with what is right."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip2 import disk
from blip2.api.collect import CollectionRun, asking, captioning
from blip2.collection.summary import OnResults
from blip2.config import MatcherConfig
from blip2.errors import CheckpointError, OptionError, option
from blip2.evaluate import matching, report, results
from blip2.evaluate.benchmark import ASK, CAPTION, CHOOSE, MATCHING, PAIR, RETRIEVAL, RETRIEVE, Benchmark
from blip2.evaluate.benchmarks import BENCHMARKS
from blip2.evaluate.compare import by_type, compared
from blip2.evaluate.examples import ANSWERS, Example, answers, read, said, texts_of
from blip2.evaluate.prepare import prepare
from blip2.evaluate.protocol import Facts, config_of, facts_of
from blip2.evaluate.report import Told
from blip2.plaintext import read_lines
from blip2.scores import VQA_RULES, paired

SCORES = "scores.json"
MOST_SHOWN = 20
"""Of the rows whose answers another model gave otherwise."""
OTHER_RULE = {"official": "lavis", "lavis": "official"}
"""By which answers to benchmarks are compared as well."""
OnSeen = Callable[[int, int], None]
WHERE: dict[str, Any] = {"key_column": "row", "image_column": "image", "format": "jsonl"}


@dataclass(frozen=True)
class Evaluation:
    """What is checked and can begin. ``run``: collects what the model says; the same call goes on where it was, after
    `see`. ``rows``: the file. ``benchmark`` and ``facts``: of a named one, and what its report says beside the
    scores."""

    rows: Path
    examples: Sequence[Example]
    rule: str
    folder: Path
    run: CollectionRun
    benchmark: Benchmark | None = None
    facts: Facts | None = None
    nearest: matching.Nearest | None = field(default=None, repr=False)

    @property
    def num_missing(self) -> int:
        """Rows that nothing is known of yet. Raises CollectionError."""
        path = self.folder / ANSWERS
        return len(self.examples) - (sum(1 for _ in read_lines(path)) if path.exists() else 0)

    def see(self, on_progress: OnSeen = lambda done, total: None) -> None:
        """What a retrieval needs before its run: the vectors of all pictures and texts. Raises CollectionError."""
        if self.nearest is not None:
            matching.see(self.run, self.nearest, on_progress)

    def scores(self, against: Path | None = None) -> dict[str, Any]:
        """What was said, compared; written to scores.json as well, and for people to report.html. ``against``: the
        folder of another model's evaluation of the same rows. Raises CollectionError where answers are missing, or are
        not of these rows."""
        compared, examples, ours, theirs = self._compared(against)
        found: dict[str, Any] = {"rows": len(self.examples), **compared}
        if self.facts is not None:
            found |= self.facts.told(found["scores"])
        disk.write_text(self.folder / SCORES, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        report.write(self.folder, self.rows, found, examples, ours, theirs)
        return found

    def _compared(self, against: Path | None) -> tuple[dict[str, Any], Sequence[Example], Told, Told | None]:
        """Beside the scores what the page shows: the rows, what was said of them, and what another model said."""
        if self.nearest is not None or (self.benchmark is not None and self.benchmark.task == PAIR):
            if against is not None:
                raise OptionError(f"{option('against')} compares answers, which a model that matches does not give")
            shown: tuple[Sequence[Example], Told]
            if self.nearest is None:
                totals, num_failed = matching.scores_of_pairs(self.examples, self.folder)
                shown = matching.chosen_of_pairs(self.examples, self.folder)
            else:
                totals, num_failed = matching.scores_of_retrieval(self.examples, self.folder, self.nearest)
                shown = self.examples, matching.found_first(self.examples, self.folder, self.nearest)
            return {"failed": num_failed, "scores": totals, "types": {}}, *shown, None
        rows = answers(self.folder, len(self.examples))
        texts = texts_of(rows)
        apart = self.benchmark is not None and self.benchmark.has_domains
        other = OTHER_RULE.get(self.rule, "") if self.benchmark is not None and self.benchmark.task == ASK else ""
        scored = compared(self.examples, texts, self.rule, apart=apart, other=other)
        found: dict[str, Any] = {"failed": sum(text is None for text in texts), "scores": scored.totals}
        found["types"] = {} if apart else by_type(self.examples, scored.each)
        if any(example.are_people for example in self.examples):
            found["rule"] = self.rule
        if self.examples[0].question is None:
            found["not_computed"] = scored.not_computed
        if self.benchmark is not None and self.benchmark.server:
            found["results"] = results.write(self.benchmark, self.folder, self.examples, texts).name
        sure = [row.get("score") if row is not None else None for row in rows]
        ours = Told(texts, scored.each, sure, "CIDEr" if self.examples[0].question is None else "accuracy")
        theirs = None
        if against is not None:
            found["against"], theirs = self._beside(against, ours)
        return found, self.examples, ours, theirs

    def _beside(self, against: Path, ours: Told) -> tuple[dict[str, Any], Told]:
        others = said(against, len(self.examples))
        theirs = Told(others, compared(self.examples, others, self.rule, java=False).each)
        both = [(a, b, example.picture) for a, b, example in zip(ours.each, theirs.each, self.examples, strict=True)
                if a is not None and b is not None]  # fmt: skip
        if not both:
            raise OptionError(f"{option('against')} compares scores, and the answers to these rows are not published")
        changed = [
            {"row": row, "was": before, "is": now}
            for row, (before, now) in enumerate(zip(others, ours.said, strict=True))
            if before != now
        ]
        own, other, pictures = zip(*both, strict=True)
        return {
            "folder": str(against), "mean": sum(other) / len(other), "changed": len(changed),
            "better": sum(a > b for a, b, _ in both), "worse": sum(a < b for a, b, _ in both),
            "p": paired(own, other, pictures), "first_changed": changed[:MOST_SHOWN],
        }, theirs  # fmt: skip


def evaluating(
    rows: Path, folder: Path, *, rule: str | None = None, question_prompt: str | None = None, **options: Any
) -> Evaluation:
    """All that can be known to be wrong is told here. ``options``: those of `blip2.caption_collection` or
    `blip2.ask_collection`: ``model``, how it decodes, ``limit``, ``shard``, ... With a model that matches, rows with
    captions are a retrieval, of which ``candidates`` are read together with what they are near to.
    ``question_prompt``: the words around each question, "Question: {} Answer:", in the place of the model's own.

    Raises CollectionError with file and line for a row that cannot be used, OptionError, CheckpointError.
    """
    rule = _checked_rule(rule or "official")
    examples = read(rows)
    asks = examples[0].question is not None
    if question_prompt is not None:
        _check_question_prompt("question_prompt", question_prompt, asks, rows)
    if asks and options.get("prompt") is not None:
        raise OptionError(f"{option('prompt')} is for captions, and {rows} has questions; word them with "
                          f"{option('question_prompt')}")  # fmt: skip
    is_matching = _matches(options.get("model"), options.get("revision"))
    if is_matching and asks:
        raise OptionError(f"{rows}: has questions, which a model that matches cannot answer; name another with "
                          f"{option('model')}")  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    if is_matching:
        candidates = options.pop("candidates", RETRIEVAL.candidates)
        run, nearest = matching.beginning(RETRIEVE, examples, rows, folder, candidates, **options)
        return Evaluation(rows, examples, rule, folder, run, nearest=nearest)
    where = {**WHERE, "output": folder / ANSWERS, **options}
    if asks:
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
    """As `evaluating`, of one of `BENCHMARKS`, whose files are somewhere in the folder ``data``. ``protocol``: whose
    prompts, lengths and beams, see `benchmark.Settings`; what ``options`` has of these counts before it. ``first``: of
    so many rows alone. ``question_prompt``: as ``prompt`` of a benchmark that asks.

    Raises CollectionError, which says where what is missing is had, RecipeError, CheckpointError, OptionError.
    """
    if name not in BENCHMARKS:
        raise OptionError(f"there is no benchmark {name}; there are {', '.join(BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    if protocol not in benchmark.settings:
        raise OptionError(f"{option('protocol')} is {protocol!r}; it may be {', '.join(benchmark.settings)}")
    if first is not None and first < 1:
        raise OptionError(f"{option('first')} is {first}; give 1 or more, or leave it out")
    asks = benchmark.task in (ASK, CHOOSE)
    if question_prompt is not None:
        _check_question_prompt("question_prompt", question_prompt, asks, name)
        if options.get("prompt") is not None:
            raise OptionError(f"{option('prompt')} and {option('question_prompt')} are one for {name}; leave one out")
        options["prompt"] = question_prompt
    elif asks and options.get("prompt"):
        _check_question_prompt("prompt", options["prompt"], asks, name)
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
    ``against`` what has changed. See `evaluating` for options and errors.

        evaluate("questions.jsonl", "scores/")
        evaluate("vqav2", "scores/", data="datasets/", model="Salesforce/blip2-opt-2.7b")

    ``rows``: a file of rows, or the name of a benchmark; of that with ``data``, the folder of its files, and the
    options of `benchmarking`.
    """
    evaluation = begun(str(rows), None if data is None else Path(data), Path(folder), options)
    evaluation.see()
    evaluation.run.run(on_results)
    return evaluation.scores(None if against is None else Path(against))


def begun(rows: str, data: Path | None, folder: Path, options: Mapping[str, Any]) -> Evaluation:
    """`benchmarking` for the name of a benchmark, else `evaluating`. Raises their errors."""
    if rows in BENCHMARKS:
        return benchmarking(rows, data or Path("."), folder, **options)
    if data is not None:
        raise OptionError(f"{option('data')} is for a benchmark, and {rows} is none of {', '.join(BENCHMARKS)}")
    near = difflib.get_close_matches(rows, BENCHMARKS, n=1)
    if near and not Path(rows).exists():
        raise OptionError(f"{rows}: there is no such file, and no such benchmark; did you mean {near[0]}?")
    for name in ("protocol", "first"):
        if name in options:
            raise OptionError(f"{option(name)} is for a benchmark, and {rows} is none of {', '.join(BENCHMARKS)}")
    return evaluating(Path(rows), folder, **options)


def _matches(model: Any, revision: str | None) -> bool:
    try:
        return isinstance(config_of(model, revision, local_files_only=True), MatcherConfig)
    except CheckpointError:  # which is told when the model is loaded
        return False


def _check_question_prompt(name: str, prompt: str, asks: bool, of: object) -> None:
    if not asks:
        raise OptionError(f"{option(name)} is for questions, and {of} has none; leave it out")
    if prompt.count("{}") != 1:
        raise OptionError(f"{option(name)} is {prompt!r}; write {{}} once, where the question goes")


def _checked_rule(rule: str) -> str:
    if rule not in VQA_RULES:
        raise OptionError(f"{option('rule')} is {rule!r}; it may be {', '.join(VQA_RULES)}")
    return rule
