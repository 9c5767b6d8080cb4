"""``blip2 ask``: images and questions in, answers out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from blip2.cli.collect import COLLECTION, Collection
from blip2.cli.images import IMAGE_OPTIONS, Asked, find_images, of_reading
from blip2.cli.options import (
    CHAT_TEMPLATE,
    DECODING,
    DECODING_NAMES,
    MODEL,
    OUTPUT,
    given,
    load_pipeline,
    of_model,
    of_template,
    with_options,
)
from blip2.cli.report import Report, row_of, see

if TYPE_CHECKING:
    from blip2.encoded import EncodedImage
    from blip2.tasks.speaker import Speaker

    Answerer = Callable[[Speaker, Sequence[EncodedImage], Sequence[str]], list[dict[str, Any]]]


@click.command("ask")
@click.argument("arguments", nargs=-1, metavar="IMAGE... QUESTION")
@click.option("-q", "--question", "questions", multiple=True, help="A question. Repeatable; all arguments are "
              "images then.")  # fmt: skip
@click.option("--choices", metavar="A,B,...", help="Choose the most likely of these answers.")
@click.option("--question-column", metavar="NAME", help="With -o: column of the question in rows.")
@with_options(OUTPUT, COLLECTION, IMAGE_OPTIONS, DECODING, (*MODEL, CHAT_TEMPLATE))
@click.pass_context
def command(
    context: click.Context,
    /,
    arguments: tuple[str, ...],
    questions: tuple[str, ...],
    choices: str | None,
    question_column: str | None,
    batch_size: int,
    as_json: bool,
    **others: Any,
) -> None:
    """Answer a question about one or more images.

    The question is the last argument, after one or more IMAGEs (files, folders, URLs, or - for standard input). An
    index made by blip2 index --for ask is accepted instead: its images are not opened again. Folders are searched
    recursively. Write only the question: the prompt that the model expects is added. -q asks several questions about
    each image, in order.

    One image prints its answer; several print one line each: the image, a tab, the answer. With several questions, the
    question and a tab come before each answer. An unreadable image does not stop the others; the exit code is then 1.

    The default is 5 beams and at most 10 tokens. --choices generates nothing: it compares the given answers, and --json
    shows the probability of each.

    With -o, --sidecar, --xmp or --embed, the images can be a whole collection, as for blip2 caption. Several questions
    give one row each. --question-column reads the questions from the rows.

    \b
    blip2 ask street.jpg "how many buses are there?"
    blip2 ask photos/*.jpg "is it raining?" --choices yes,no
    blip2 ask photos.index "is there a dog?" --choices yes,no --json
    blip2 ask street.jpg -q "what is on the left?" -q "what colour is it?"
    blip2 ask photos/ "what is in the foreground?" -o answers.jsonl
    blip2 ask vqa.jsonl --question-column question -o answers.jsonl
    curl -s https://example.org/photo.jpg | blip2 ask - "who is in the picture?"
    """
    from blip2.tasks.speaker import chunks

    collection = Collection(others)
    is_asked = collection.is_asked
    if question_column and not (is_asked and not questions):
        raise click.UsageError("--question-column needs results in files, without -q; add -o FILE")
    if not question_column:
        arguments, questions = _split(arguments, questions, has_list=others["files_from"] is not None)
    model = of_model(others) | of_reading(others) | of_template(others)
    if is_asked:
        from blip2.api.collect import asking

        decoding = given({name: others.pop(name) for name in DECODING_NAMES})
        context.exit(
            collection.run(
                asking, arguments, model, others, questions=questions, question_column=question_column,
                choices=None if choices is None else choices.split(","), batch_size=batch_size, as_json=as_json,
                **decoding,
            )
        )  # fmt: skip
    asked = Asked.of(arguments, others)
    listed = None if choices is None else choices.split(",")
    answers = _answerer(questions, listed, given(others), batch_size, model["model"])
    images = find_images(asked, takes_index=True)
    blip = load_pipeline(**images.model(model))
    is_labelled = images.are_several
    report = Report(
        blip.name, as_json=as_json, shows_image=is_labelled, shows_question=len(questions) > 1, is_null=asked.is_null
    )
    report.about(images)
    seen = images.seen_by(blip, batch_size)
    for batch in see(seen, images.sources, batch_size):
        # All pairs of image and question, grouped by image.
        repeated = [image for image in batch.images for _ in questions]
        rows = answers(blip.speaker, repeated, [*questions] * len(batch.images))
        report.results(batch, map(list, chunks(rows, len(questions))))
    context.exit(report.exit_code)


def _split(
    arguments: tuple[str, ...], questions: tuple[str, ...], has_list: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Images and questions. The last argument is the question, unless -q is given. ``has_list``: of images."""
    if questions:
        return arguments, questions
    if not arguments:
        raise click.UsageError("Missing argument 'IMAGE... QUESTION'.")
    *images, question = arguments
    if not images and not has_list:
        missing = "no question" if os.path.exists(question) else "no image"
        raise click.UsageError(f"there is {missing}; give the image first, the question last")
    if os.path.exists(question):
        raise click.UsageError(
            f"the last argument, {click.format_filename(question)}, is a file; put the question last"
        )
    return tuple(images), (question,)


def _answerer(
    questions: Sequence[str],
    choices: list[str] | None,
    given_options: dict[str, Any],
    batch_size: int,
    model: str | None,
) -> Answerer:
    """A function that answers pairs of image and question. Checks the options before a model is loaded."""
    from blip2.api.loading import manner_of
    from blip2.tasks.ask import ask, check_choices, rank
    from blip2.tasks.defaults import ASK, merged
    from blip2.tasks.speaker import check_batch_size
    from blip2.text import question_prompt

    check_batch_size(batch_size)
    for question in questions:
        question_prompt(question, manner_of(model))
    if choices is None:
        merged(ASK, given_options)

        def write(speaker: Speaker, images: Sequence[EncodedImage], asked: Sequence[str]) -> list[dict[str, Any]]:
            options = merged(speaker.defaults.ask, given_options)
            found = ask(speaker, images, asked, options=options, batch_size=batch_size)
            return [{"question": question, **row_of(best)} for question, (best, *_) in zip(asked, found, strict=True)]

        return write

    candidates = check_choices(choices)
    if given_options:
        raise click.UsageError("--choices generates nothing; leave out the decoding options")

    def choose(speaker: Speaker, images: Sequence[EncodedImage], asked: Sequence[str]) -> list[dict[str, Any]]:
        ranked = rank(speaker, images, asked, candidates, batch_size=batch_size)
        return [
            {
                "question": question,
                "text": row[0].text,
                "score": row[0].score,
                "choices": {choice.text: round(choice.probability, 6) for choice in row},
            }
            for question, row in zip(asked, ranked, strict=True)
        ]

    return choose
