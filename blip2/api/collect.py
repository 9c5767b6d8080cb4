"""Whole collections: any source through a model into any format, with resuming."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from blip2 import checkpoint
from blip2.api.loading import LoadOptions, as_matcher, as_pipeline, load, manner_of
from blip2.api.machines import MACHINES, Machines
from blip2.api.matcher import Matcher
from blip2.api.pipeline import Pipeline
from blip2.api.work import answers, captions, matches
from blip2.api.worker import Facts
from blip2.checkpoint.files import digest_of_folder
from blip2.collection import Journal, Record, Summary, run
from blip2.collection.feed import Feed
from blip2.collection.questions import Questions
from blip2.collection.request import OUTPUTS, READING, RUN_OPTIONS, WORDING, Plan, Request, check_names, planned
from blip2.collection.review import write_review
from blip2.collection.run import Outcome, Work, run_by
from blip2.collection.summary import OnResults
from blip2.errors import CheckpointError, CollectionError, ImageError, OptionError, option
from blip2.published import PUBLISHED
from blip2.tasks.ask import check_choices
from blip2.tasks.defaults import ASK, BATCH_SIZE, CAPTION, NAMES, merged
from blip2.tasks.speaker import check_batch_size
from blip2.text import question_prompt

LOADING = tuple(LoadOptions.__annotations__)
SAME_RESULTS = ("device",)
"""Options of `load` that do not change results."""
PathLike = str | os.PathLike[str]
Places = PathLike | Sequence[PathLike]


@dataclass(frozen=True)
class Model:
    """``name``: the model to load on demand, with ``options``; or a ``loaded`` model. ``kind``: raises CheckpointError
    for a model of another kind."""

    kind: Callable[[Any], Any]
    name: str | None
    options: Mapping[str, Any]
    loaded: Any = None

    @cached_property
    def description(self) -> dict[str, Any]:
        """What is known of the model before it is loaded, for `Journal.begin`."""
        if self.loaded is not None:
            return {"model": self.loaded.name}
        options = {name: value for name, value in self.options.items() if name not in SAME_RESULTS}
        is_folder = self.name is not None and os.path.isdir(self.name)
        return {"model": os.path.abspath(str(self.name)) if is_folder else self.name or "miniature", **options}

    @cached_property
    def revision(self) -> str:
        """The commit of a published model; "" if there is none."""
        published = PUBLISHED.get(self.name or "")
        return self.options.get("revision") or (published.revision if published is not None else None) or ""

    def agreed(self, journal: Journal | Facts) -> None:
        """Check that its files, as far as they exist here, are those of earlier runs. Raises CollectionError."""
        if self.loaded is None:
            with suppress(CheckpointError, OSError):
                folder = checkpoint.resolve(self.name, revision=self.options.get("revision"), local_files_only=True)
                journal.agree("the model's files", digest_of_folder(folder))

    def get(self, journal: Journal | Facts) -> Any:
        """The loaded model. Raises CheckpointError, and CollectionError if earlier runs used another one."""
        found = self.load_unchecked()
        self.agreed(journal)
        model = found.model if isinstance(found, Matcher) else found.speaker.model
        journal.agree("the model", found.identity if isinstance(found, Matcher) else found.speaker.identity)
        journal.agree("dtype", str(next(model.vision.parameters()).dtype).removeprefix("torch."))
        return found

    def load_unchecked(self) -> Any:
        """The loaded model, without the check. Raises CheckpointError."""
        return self.loaded or self.kind(load("miniature" if self.name is None else self.name, **self.options))


@dataclass(frozen=True)
class CollectionRun:
    """A checked run that can start. ``plan``: its source, outputs, and what it would do."""

    plan: Plan
    model: Model
    work: Callable[[Callable[[Model], Any]], Work]
    """Makes the work, given a function that loads models. Can be pickled, for workers."""
    batch_size: int
    machines: Machines = field(default_factory=Machines)

    def __post_init__(self) -> None:
        self.machines.check(self.model, self.plan.source, self.plan.request.run_options.limit)

    def get_model(self, journal: Journal | Facts, model: Model) -> Any:
        """The model; the journal checks that it is the same one."""
        return model.get(journal) if model == self.model else model.load_unchecked()

    def run(self, on_results: OnResults = lambda summary, results: None, *, html: PathLike | None = None) -> Summary:
        """Process what is not finished, then write the review page. A model is only loaded if it is needed.

        Raises CollectionError, also if the disk is full, and CheckpointError; finished results are kept.
        """
        try:
            return self._run(on_results, html)
        except OSError as error:
            where = error.filename or self.plan.request.outputs.output or self.plan.journal.folder.parent
            raise CollectionError(
                f"{where}: cannot be written or read ({error.strerror or error}); finished results are kept; fix that, "
                "and the same command resumes"
            ) from error

    def _run(self, on_results: OnResults, html: PathLike | None) -> Summary:
        with self.plan.begun() as job:
            self.model.agreed(job.journal)

            def work(records: Iterator[Record]) -> Iterator[Outcome | ImageError]:
                if not isinstance(records, Feed) or records.begins(self.batch_size):
                    yield from self.work(partial(self.get_model, job.journal))(records)

            if self.machines:
                summary = run_by(job, self.machines.do(job, self.model, self.work), on_results)
            else:
                summary = run(job, work, on_results)
            if html is not None:
                write_review(Path(html), self.plan.source, job.journal)
        return summary


def caption_collection(
    source: Places,
    output: PathLike | None = None,
    *,
    model: str | Path | Pipeline | None = None,
    on_results: OnResults = lambda summary, results: None,
    html: PathLike | None = None,
    **options: Any,
) -> Summary:
    """Generate captions for all images of a collection; the same call resumes an interrupted one.

        blip2.caption_collection("photos/", sidecar=".txt", prefix="sks dog, ")
        blip2.caption_collection("photos/", "photos/metadata.jsonl", model="Salesforce/blip2-opt-2.7b")
        blip2.caption_collection("shards/{000..099}.tar", "captioned/", limit=1000)

    ``source``: folders, files, lists of rows, shards or patterns, see `blip2.collection.sources.open_source` for its
    options (``image_column``, ``caption_column``, ``images``, ``split``, ``exclude``, ``recursive``, ...).
    ``output``: a file or a folder whose name decides the ``format``; or ``sidecar``, ``xmp``, ``embed``, see
    `blip2.collection.sinks.Outputs`. Wording: ``if_exists``, ``prefix``, ``suffix``, ``template``, ``replace``,
    ``remove``, ``forbid_words``, ``dedupe_words``, ``max_chars``, see `blip2.collection.wording.Wording`. Resuming
    and dividing: ``limit``, ``shard`` (3, 16), ``retry_failed``, ``restart``, ``dedupe``, see `RunOptions` there.
    Several GPUs or machines: ``devices="0,1"``, or ``engine="ray"`` with ``replicas`` and ``address``, see
    `blip2.api.machines.Machines`; the output is the same.

    ``model``: a `Pipeline`, or a name as for `load`, with its options (``device``, ``dtype``, ...). ``prompt``,
    ``num_captions``, ``batch_size`` and the options of `GenerateOptions` as for `Pipeline.caption`. ``pick="best"``:
    of several captions, the first is the one that a matching model (``matcher``, by default the bundled one) scores
    best. ``on_results`` is called after every few images, from another thread; ``html``: a review page, written at
    the end.

    For loops of your own: `captioning` checks everything without starting, and its ``plan`` lists what it would do.
    `blip2.collection` has sources, sinks and `run`; `blip2.api.work` applies models to records.

    An unreadable image is counted in the summary, and the run continues. Raises OptionError and CollectionError
    before the model is loaded, CheckpointError, and CollectionError if the disk is full.
    """
    return captioning(source, output, model=model, **options).run(on_results, html=html)


def ask_collection(
    source: Places,
    questions: str | Sequence[str] = (),
    output: PathLike | None = None,
    *,
    model: str | Path | Pipeline | None = None,
    on_results: OnResults = lambda summary, results: None,
    html: PathLike | None = None,
    **options: Any,
) -> Summary:
    """Ask about all images of a collection; see `caption_collection` for sources, outputs and options.

    ``questions``: one or several, each asked about each image; or ``question_column`` for questions in the rows.
    Several questions give one row each, with the question in a column. ``choices``: choose the most likely of these.
    """
    return asking(source, questions, output, model=model, **options).run(on_results, html=html)


def match_collection(
    source: Places,
    texts: Sequence[str],
    output: PathLike | None = None,
    *,
    model: str | Path | Matcher | None = None,
    on_results: OnResults = lambda summary, results: None,
    html: PathLike | None = None,
    **options: Any,
) -> Summary:
    """Compare all images of a collection with ``texts``; see `caption_collection` for sources, outputs and options. The
    texts of each image are written from best to worst, with their probabilities; `matching` has further options."""
    return matching(source, texts, output, model=model, **options).run(on_results, html=html)


def captioning(
    source: Places,
    output: PathLike | None = None,
    *,
    model: str | Path | Pipeline | None = None,
    prompt: str = "",
    num_captions: int = 1,
    pick: str | None = None,
    matcher: str | Path | Matcher | None = None,
    batch_size: int = BATCH_SIZE,
    **options: Any,
) -> CollectionRun:
    """`caption_collection` without starting it. Everything that can be checked is checked here."""
    speaker, rest = model_of(as_pipeline, model, options)
    written = {name: rest.pop(name) for name in NAMES if name in rest}
    written |= {"num_return": num_captions} if num_captions != 1 else {}
    decoding, machines = merged(CAPTION, written), Machines.of(rest)
    check_batch_size(batch_size)
    if pick not in (None, "best"):
        raise OptionError(f"{option('pick')} is {pick!r}; use 'best'")
    if pick and decoding.num_return < 2:
        raise OptionError(f"{option('pick')} needs several captions; set {option('num_return')} above 1")
    if matcher is not None and not pick:
        raise OptionError(f"{option('matcher')} needs {option('pick')}; leave it out")
    judge, _ = model_of(as_matcher, matcher or "miniature-itm", {}) if pick else (None, {})
    identity = {**speaker.description, "prompt": prompt, **asdict(decoding), "pick": pick or ""}
    identity |= {"matcher": judge.description["model"]} if judge is not None else {}
    plan = planned_run(source, output, rest, speaker, {"task": "caption", **identity})
    work = partial(made, captions, (speaker, prompt, written, batch_size, judge))
    return CollectionRun(plan, speaker, work, batch_size, machines)


def asking(
    source: Places,
    questions: str | Sequence[str] = (),
    output: PathLike | None = None,
    *,
    model: str | Path | Pipeline | None = None,
    question_column: str | None = None,
    choices: Sequence[str] | None = None,
    choices_column: str = "",
    wording: str = "",
    batch_size: int = BATCH_SIZE,
    **options: Any,
) -> CollectionRun:
    """`ask_collection` without starting it. ``choices_column``: the column of each row's own choices. ``wording``: a
    template around each question, instead of the model's own."""
    speaker, rest = model_of(as_pipeline, model, options)
    asked = [questions] if isinstance(questions, str) else list(questions)
    for question in asked:
        question_prompt(question, manner_of(model))
    if not asked and not question_column:
        raise OptionError(f"there is no question; give one, or {option('question_column')}")
    written = {name: rest.pop(name) for name in NAMES if name in rest}
    if (choices is not None or choices_column) and written:
        unused = option(next(iter(written)))
        raise OptionError(f"{unused} has no effect with choices: nothing is generated; leave it out")
    chosen = None if choices is None else check_choices(choices)
    decoding, machines = merged(ASK, written), Machines.of(rest)
    check_batch_size(batch_size)
    if len(asked) > 1 and any(rest.get(name) for name in ("sidecar", "xmp", "embed")):
        raise OptionError(f"{len(asked)} questions need a table with several rows per image; give {option('output')}")
    by = chosen or choices_column
    plan = planned_run(
        source, output, rest, speaker,
        {"task": "ask", **speaker.description, **({"choices": by} if by else asdict(decoding)),
         **({"wording": wording} if wording else {})},
        view=lambda view: Questions(view, asked, question_column or ""), takes_text=False,
    )  # fmt: skip
    work = partial(made, answers, (speaker, written, batch_size, chosen, wording, choices_column))
    return CollectionRun(plan, speaker, work, batch_size, machines)


def matching(
    source: Places,
    texts: Sequence[str],
    output: PathLike | None = None,
    *,
    model: str | Path | Matcher | None = None,
    words: str = "{}",
    top: int | None = None,
    candidates: int = 32,
    batch_size: int = BATCH_SIZE,
    **options: Any,
) -> CollectionRun:
    """How well texts match all images of a collection, best first, with scores: ``top`` of them, ranked as in
    `Matcher.classify`. ``words``: the text around each label, such as "a photo of a {}"."""
    judge, rest = model_of(as_matcher, model or "miniature-itm", options)
    if "{}" not in words:
        raise OptionError(f"{option('template')} is {words!r}, without a place for the text; add {{}} there")
    if not texts:
        raise OptionError("there is no text; give at least one to compare with")
    if top is not None and top < 1:
        raise OptionError(f"{option('top')} is {top}, use 1 or more")
    check_batch_size(batch_size)
    number = len(texts) if top is None else top
    nearest = len(texts) if top is None else candidates
    machines = Machines.of(rest)
    identity = {"task": "match", **judge.description, "texts": [*texts], "words": words, "top": top}
    plan = planned_run(source, output, rest, judge, identity, takes_text=False)
    work = partial(made, matches, (judge, texts, words, number, nearest, batch_size))
    return CollectionRun(plan, judge, work, batch_size, machines)


def made(make: Callable[..., Work], arguments: Sequence[Any], get: Callable[[Model], Any]) -> Work:
    """Calls ``make`` with models among the arguments loaded by ``get``."""
    return make(*(get(each) if isinstance(each, Model) else each for each in arguments))


def model_of(kind: Callable[[Any], Any], model: Any, options: Mapping[str, Any]) -> tuple[Model, dict[str, Any]]:
    """The model, and the options that are not for loading it."""
    loading = {name: value for name, value in options.items() if name in LOADING and value is not None}
    rest = {name: value for name, value in options.items() if name not in LOADING}
    if isinstance(model, Pipeline | Matcher):
        if loading:
            raise OptionError(f"{option(next(iter(loading)))} is for loading a model, which is done here; leave it out")
        return Model(kind, None, {}, model), rest
    return Model(kind, None if model is None else str(model), loading), rest


def planned_run(
    source: Places, output: PathLike | None, options: dict[str, Any], model: Model, identity: Mapping[str, Any],
    **view: Any,
) -> Plan:  # fmt: skip
    if options.get("dedupe") and identity.get("sample") and identity.get("seed") is None:
        raise OptionError(
            f"{option('dedupe')} gives equal images the same text, but sampling without a seed differs each time; "
            f"give {option('seed')}, or leave out {option('dedupe')}"
        )
    check_names(options, [*READING, *OUTPUTS, *WORDING, *RUN_OPTIONS, *MACHINES], [*NAMES, *LOADING])
    if not view.get("takes_text", True) and str(output).endswith(".jsonl"):  # so that scores and questions are included
        options = {"format": "jsonl", **options}
    places = [source] if isinstance(source, str | os.PathLike) else list(source)
    constants = {"model": model.description["model"], "revision": model.revision}
    request = Request.of(
        [os.fspath(place) for place in places],
        {**options, "output": os.fspath(output) if output is not None else "", "constants": constants},
        identity=identity, **view,
    )  # fmt: skip
    return planned(request)
