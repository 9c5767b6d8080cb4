"""``blip2 evaluate``: scores of a model on a benchmark, or on rows with references."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from blip2.cli.collect import MACHINES, RUN_OPTIONS, Collection
from blip2.cli.options import DECODING, MODEL, MODEL_NAMES, given, printing, with_options

if TYPE_CHECKING:
    from blip2.api.collect import CollectionRun
    from blip2.evaluate import Evaluation

RULES = ("official", "lavis", "lmms-eval", "all-ten", "aokvqa")
PROTOCOLS = ("paper", "lavis")
MOST_DIFFERENCES = 12


def _list(context: click.Context, parameter: click.Parameter, is_asked: bool) -> None:
    if not is_asked or context.resilient_parsing:
        return
    from rich.table import Table

    from blip2.evaluate import BENCHMARKS, ROBUSTNESS
    from blip2.evaluate.robust import TITLE

    with printing() as console:
        grid = Table("benchmark", "what", "rows", "published in", box=None, pad_edge=False)
        for name, each in BENCHMARKS.items():
            source = each.published["paper"].source if each.published else ""
            grid.add_row(name, each.title, f"{each.rows:,}", ",".join(source.split(",")[:2]))
        grid.add_row(ROBUSTNESS, TITLE, "", "")
        console.print(grid)
    context.exit()


@click.command("evaluate")
@click.argument("rows", metavar="BENCHMARK|ROWS")
@click.option("--list", "is_list", is_flag=True, is_eager=True, expose_value=False, callback=_list,
              help="List the benchmarks.")  # fmt: skip
@click.option("--data", type=click.Path(path_type=Path), metavar="DIR", help="Folder that holds the files of a "
              "benchmark, at any depth; for robustness, a file of rows.  [default: .]")  # fmt: skip
@click.option("-o", "--output", "folder", type=click.Path(file_okay=False, path_type=Path), help="Folder for answers "
              "and scores; an interrupted run resumes there.  [default: evaluations/NAME-MODEL]")  # fmt: skip
@click.option("--protocol", type=click.Choice(PROTOCOLS), help="For benchmarks: whose prompts and decoding to "
              "use.  [default: paper]")  # fmt: skip
@click.option("--first", type=click.IntRange(1), metavar="N", help="For benchmarks: only the first N rows.")
@click.option("--rule", type=click.Choice(RULES), help="Definition of VQA accuracy.  [default: official; "
              "for benchmarks their own]")  # fmt: skip
@click.option("--against", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder of another "
              "evaluation to compare with: the differences and their significance.")  # fmt: skip
@click.option("--prompt", help="Text that captions continue, or the instruction for them; for benchmarks also the "
              'question template, "Question: {} Answer:".')  # fmt: skip
@click.option("--question-prompt", metavar="TEXT", help='Words around each question, such as "Question: {} Answer:", '
              "instead of the model's own.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(1), help="Images or questions per batch.")
@with_options(RUN_OPTIONS, MACHINES, DECODING, MODEL)
@click.pass_context
def command(
    context: click.Context,
    /,
    rows: str,
    data: Path | None,
    folder: Path | None,
    against: Path | None,
    **others: Any,
) -> None:
    """Evaluate a model on benchmarks, or against references of your own.

    BENCHMARK is one of --list. Its official files, LAVIS's lists or the parquet files of the hub are searched for below
    --data; an error names what is missing and where to get it. Prompts and decoding are those of the published scores,
    which are printed beside yours, with every setting that differs. A result file for the evaluation server is written.

    ROWS is a JSON-lines file. Each row names an image and has a question with one answer (exact match) or with the
    answers of several people (VQA accuracy), or captions (BLEU, ROUGE-L and CIDEr after PTB tokenization; METEOR and
    SPICE if their Java programs are installed; recall if the model is a matching model). "type" in a row adds a table
    by type of question. Scores are percentages with 95 % confidence intervals (bootstrap over images). Unreadable
    images count as wrong.

    \b
    {"image": "1.jpg", "question": "how many dogs?", "answer": "two", "type": "count"}
    {"image": "1.jpg", "question": "how many dogs?", "answers": ["2", "2", "two", "3", ...]}
    {"image": "1.jpg", "captions": ["two dogs on a sofa", "a couch with two dogs", ...]}

    The benchmark "robustness" takes such a file as --data: the share of answers that change when questions are
    rephrased ("rephrased" in a row adds your own), and images compressed, cropped, rotated or batched differently.

    \b
    blip2 evaluate vqav2 --data datasets/ -m Salesforce/blip2-opt-2.7b
    blip2 evaluate questions.jsonl -o scores/
    blip2 evaluate questions.jsonl -o scores-int4/ --quantize int4 --against scores/
    blip2 evaluate robustness --data questions.jsonl
    """
    from blip2.evaluate import begun as beginning

    model = {name: others.pop(name) for name in MODEL_NAMES}
    collection = Collection(others, (*RUN_OPTIONS, *MACHINES))
    folder = folder or Path("evaluations", f"{Path(rows).stem}-{Path(model['model'] or 'miniature').name}")
    started: list[Evaluation] = []

    def begin(places: list[str], output: None, **options: Any) -> CollectionRun:
        started.append(evaluation := beginning(rows, data, folder, options))
        if "dry_run" not in collection.given:
            evaluation.see(lambda done, total: click.echo(f"blip2: {done:,} of {total:,} images encoded", err=True))
        return evaluation.run

    asked = {**given(others), "files_from": None, "is_null": False}
    code = collection.run(begin, [rows], model, asked)
    if "dry_run" not in collection.given:
        if missing := started[0].num_missing:
            click.echo(f"blip2: {missing} rows have no answer yet, so there are no scores", err=True)
        else:
            click.echo(table(started[0].scores(against)))
            click.echo(f"blip2: {folder / 'scores.json'}; report: {folder / 'report.html'}", err=True)
    context.exit(code)


def table(found: dict[str, Any]) -> str:
    """Scores as text, one per line, with the published scores of this model beside them, or of others below."""
    published = found.get("published", {}).get("scores", {})
    own = published.get(found.get("model"), {})
    lines = [f"{found['rows']} rows" + (f", {found['failed']} could not be read" if found["failed"] else "")]
    if "title" in found:
        protocol = f", protocol {found['protocol']}" if "protocol" in found else ""
        lines.insert(0, f"{found['title']}: {found['model']}{protocol}")
    width = max([20, *map(len, found["scores"]), *map(len, found["types"])])
    for name, score in [*found["scores"].items(), *found["types"].items()]:
        line = f"{name:{width}} {score['score']:6.2f}"
        if "low" in score:
            line += f"  ({score['low']:.2f} to {score['high']:.2f})"
        line += f"  published {own[name]:.2f}" if name in own else ""
        lines.append(line + (f"  {score['rows']} rows" if "rows" in score else ""))
    lines += [f"{name}: not computed; {reason}" for name, reason in found.get("not_computed", {}).items()]
    lines += _published(found, published, own)
    if found.get("results"):
        lines.append(f"for the server: {found['results']}")
    if other := found.get("against"):
        chance = f", p = {other['p']:.3g}" if "p" in other else ""
        lines.append(
            f"compared with {other['folder']}: {other['changed']} rows changed, {other['better']} better, "
            f"{other['worse']} worse{chance}"
        )
    return "\n".join(lines)


def _published(found: dict[str, Any], published: dict[str, Any], own: dict[str, float]) -> list[str]:
    lines = []
    if published:
        lines.append(f"published: {found['published']['source']}")
    for model, scores in {} if own else published.items():
        figures = ", ".join(f"{name} {score:.2f}" for name, score in scores.items())
        lines.append(f"  {model.removeprefix('Salesforce/'):24} {figures}")
    differences = found.get("differences", [])
    lines += [f"differs: {each}" for each in differences[:MOST_DIFFERENCES]]
    return lines
