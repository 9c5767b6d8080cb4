"""``blip2 evaluate``: rows with references in, scores out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blip2.cli.collect import GOING, MACHINES, Collection
from blip2.cli.options import DECODING, MODEL, MODEL_NAMES, given, with_options

if TYPE_CHECKING:
    from blip2.api.collect import CollectionRun
    from blip2.evaluate import Evaluation

RULES = ("official", "lavis", "lmms-eval", "all-ten")


@click.command("evaluate")
@click.argument("rows", type=click.Path(dir_okay=False, path_type=Path))
@click.option("-o", "--output", "folder", required=True, type=click.Path(file_okay=False, path_type=Path),
              help="Folder for answers and scores; an interrupted run resumes there.")  # fmt: skip
@click.option("--rule", type=click.Choice(RULES), default="official", show_default=True,
              help="Definition of VQA accuracy.")  # fmt: skip
@click.option("--against", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder of another "
              "evaluation to compare with: the differences and their significance.")  # fmt: skip
@click.option("--prompt", help="Text that captions continue, or the instruction for them.")
@click.option("--batch-size", type=click.IntRange(1), help="Images per batch.")
@with_options(GOING, MACHINES, DECODING, MODEL)
@click.pass_context
def command(
    context: click.Context,
    /,
    rows: Path,
    folder: Path,
    rule: str,
    against: Path | None,
    **others: Any,
) -> None:
    """Evaluate a model against reference answers or captions.

    ROWS is a JSON-lines file. Each row names an image and has a question with one answer (exact match) or with the
    answers of several people (VQA accuracy), or captions (BLEU, ROUGE-L and CIDEr after PTB tokenization). "type" in a
    row adds a table by type of question. Scores are percentages with 95 % confidence intervals (bootstrap over images).
    Unreadable images count as wrong.

    \b
    {"image": "1.jpg", "question": "how many dogs?", "answer": "two", "type": "count"}
    {"image": "1.jpg", "question": "how many dogs?", "answers": ["2", "2", "two", "3", ...]}
    {"image": "1.jpg", "captions": ["two dogs on a sofa", "a couch with two dogs", ...]}

    \b
    blip2 evaluate questions.jsonl -o scores/
    blip2 evaluate questions.jsonl -o scores-int4/ --quantize int4 --against scores/
    """
    from blip2.evaluate import evaluating

    model = {name: others.pop(name) for name in MODEL_NAMES}
    collection = Collection(others, (*GOING, *MACHINES))
    begun: list[Evaluation] = []

    def begin(places: list[str], output: None, **options: Any) -> CollectionRun:
        begun.append(evaluating(rows, folder, rule=rule, **options))
        return begun[0].run

    asked = {**given(others), "files_from": None, "is_null": False}
    code = collection.run(begin, [str(rows)], model, asked)
    if "dry_run" not in collection.given:
        if missing := begun[0].num_missing:
            click.echo(f"blip2: {missing} rows have no answer yet, so there are no scores", err=True)
        else:
            click.echo(table(begun[0].scores(against)))
    context.exit(code)


def table(found: dict[str, Any]) -> str:
    """Scores as text, a line each."""
    lines = [f"{found['rows']} rows" + (f", {found['failed']} could not be read" if found["failed"] else "")]
    for name, score in [*found["scores"].items(), *found["types"].items()]:
        line = f"{name:20} {score['score']:6.2f}"
        if "low" in score:
            line += f"  ({score['low']:.2f} to {score['high']:.2f})"
        lines.append(line + (f"  {score['rows']} rows" if "rows" in score else ""))
    if "not_computed" in found:
        lines.append(f"{', '.join(found['not_computed'])}: not computed (programs in Java)")
    if other := found.get("against"):
        lines.append(
            f"beside {other['folder']}: {other['changed']} rows changed, {other['better']} better, "
            f"{other['worse']} worse, p = {other['p']:.3g}"
        )
    return "\n".join(lines)
