"""``blip2 explain``: a heat map of the image regions that a text comes from."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blip2.cli.images import READING, of_reading
from blip2.cli.options import MODEL, load_matcher, load_pipeline, of_model, with_options
from blip2.disk import written
from blip2.errors import ImageError

if TYPE_CHECKING:
    from blip2.tasks.explain import Explanation

ARRAY = ".npy"


@click.command("explain")
@click.argument("image")
@click.argument("text", required=False)
@click.option("-q", "--question", help="Explain the answer to this question.")
@click.option("-a", "--answer", help="With --question: the answer to explain.  [default: the one generated]")
@click.option("-w", "--word", help="Explain this word of the caption.")
@click.option("-c", "--caption", help="Caption to explain, or that contains the word.  [default: the one generated]")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Output file: .png, .jpg or .webp for the "
              "image with the heat map on it, .npy for the map as float32[height, width].")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: the text explained, its score "
              "(match probability of TEXT, else log-probability), the strongest pixel [x, y].")  # fmt: skip
@with_options(READING, MODEL)
def command(
    image: str,
    text: str | None,
    question: str | None,
    answer: str | None,
    word: str | None,
    caption: str | None,
    out: Path | None,
    as_json: bool,
    **others: Any,
) -> None:
    """Show which image regions a text or an answer comes from.

    IMAGE is a file, a URL, or - for standard input. With TEXT, a matching model shows which regions support the text.
    With --question, --word or --caption, a generative model shows which regions its answer, word or caption comes from.
    The text that was explained is printed. The map is evidence of what the model used, not proof.

    \b
    blip2 explain photo.jpg "a dog" -o heat.png
    blip2 explain photo.jpg --question "how many dogs are there?" -o heat.png
    blip2 explain photo.jpg --word dogs -o heat.png
    """
    _check(text, question, answer, word, caption, out, as_json, others["model"])
    model = of_model(others) | of_reading(others)
    found: Explanation
    if text is not None:
        from blip2.tasks.match import check_text

        check_text(text)
        matcher = load_matcher(**model)
        name, start = matcher.name, time.perf_counter()
        found = matcher.explain(image, text)
    else:
        blip = load_pipeline(**model)
        name, start = blip.name, time.perf_counter()
        found = blip.explain(image, question=question, answer=answer, word=word, caption=caption)
    seconds = time.perf_counter() - start
    if out is not None:
        _write(found, out)
    if not as_json:
        click.echo(" ".join(found.text.split()))
        return
    row = {"image": image, "text": found.text, "score": found.score, "strongest": found.strongest}
    click.echo(json.dumps({**row, "file": out and str(out), "seconds": round(seconds, 4), "model": name}))


def _check(
    text: str | None,
    question: str | None,
    answer: str | None,
    word: str | None,
    caption: str | None,
    out: Path | None,
    as_json: bool,
    model: str | None,
) -> None:
    """Check the options before a model is loaded."""
    from blip2.api.loading import manner_of
    from blip2.image import check_writable
    from blip2.text import question_prompt

    options = {"--question": question, "--word": word, "--caption": caption}
    asked = [name for name, value in options.items() if value is not None]
    if text is None and not asked:
        raise click.UsageError("there is nothing to explain; give a TEXT, --question, --word or --caption")
    if text is not None and (asked or answer is not None):
        raise click.UsageError(f"a TEXT is explained alone; leave out TEXT or {(asked or ['--answer'])[0]}")
    if question is not None and (word is not None or caption is not None):
        raise click.UsageError("--question explains an answer; leave out --word and --caption")
    if answer is not None and question is None:
        raise click.UsageError("--answer needs --question; give both")
    if question is not None:
        question_prompt(question, manner_of(model))
    if out is None and not as_json:
        raise click.UsageError("there is no output; give a file with -o heat.png, or --json")
    if out is not None and out.suffix.lower() != ARRAY:
        check_writable(out)
    if out is not None and not out.parent.is_dir():
        raise ImageError(f"{out}: there is no folder {out.parent}; create it, or name another")


def _write(found: Explanation, out: Path) -> None:
    if out.suffix.lower() != ARRAY:
        from blip2.image import save_image

        save_image(found.overlay(), out)
        return
    import numpy as np

    try:
        with written(out) as unfinished, unfinished.open("wb") as file:
            np.save(file, found.heat.numpy())
    except OSError as error:
        raise ImageError(f"{out}: cannot be written ({error.strerror}); check the folder and the disk space") from None
