"""Rows for `blip2 evaluate`, and what came of them: by type, with Wilson's 95 % intervals.

    python -m miniature.photographs.score rows SPLIT/rows.jsonl -o ROWS.jsonl [--shuffle] [--captions] [--count N]
    blip2 evaluate ROWS.jsonl -o ANSWERS --model photographs
    python -m miniature.photographs.score scenes ROWS.jsonl ANSWERS [NAME=ANSWERS ...]
    python -m miniature.photographs.score photographs say.jsonl ANSWERS
    python -m miniature.photographs.score labels matches.jsonl [SPLIT/rows.jsonl]
    python -m miniature.photographs.score wrong ROWS.jsonl ANSWERS         (twenty, drawn by a seed)

``rows``: one question of each type about each scene, or its captions; with ``--shuffle`` each about the picture of
the next scene. ``scenes``: right to the letter, lists and captions in any order. *Blind*: the most frequent right
answer to the same wording. ``photographs``: whether what is said names the kind (and no other). ``labels``: of
`blip2 match --labels --top 32 --json`, about the photographs, or the scenes of one kind of a split.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from blip2 import disk
from miniature import texts
from miniature.evaluate import Tally, wilson
from miniature.photographs.stamps import kinds
from miniature.photographs.things import shown
from miniature.world import make_rng

KIND_OF = {noun: kind.singular for kind in kinds().values() for noun in (kind.singular, kind.plural)}
NOUNS = re.compile(r"\b(an? )?(" + "|".join(sorted(KIND_OF, key=len, reverse=True)) + r")\b")
LISTS = ("caption", "list", "where")
TYPES = ("caption", "list", "count", "count_absent", "exist", "side", "height", "where")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def rows_of(
    scenes: list[dict[str, Any]], folder: Path, *, shuffle: bool = False, captions: bool = False
) -> list[dict[str, Any]]:
    """A question of each type about each scene, drawn by its number, or its captions."""
    found = []
    for number, scene in enumerate(scenes):
        rng = make_rng("photographs", "score", number)
        seen = scenes[(number + 1) % len(scenes)] if shuffle else scene
        place = str((folder / seen["image"]).absolute())
        if captions:
            found.append({"image": place, "type": "caption", "captions": scene["captions"]})
            continue
        by_type = defaultdict(list)
        for question in scene["questions"]:
            by_type[question["type"]].append(question)
        for kind in TYPES:
            if by_type[kind]:
                question = rng.choice(by_type[kind])
                found.append({"image": place, **question})
    return found


def said(folder: Path, number: int) -> list[str]:
    """What `blip2 evaluate` collected, by row; "" where there is nothing."""
    answers = {int(row["key"]): row["caption"] or "" for row in read(folder / "answers.jsonl")}
    return [answers.get(row, "") for row in range(number)]


def is_right(row: dict[str, Any], text: str) -> bool:
    wanted = row["captions"][0] if "captions" in row else row["answer"]
    if row["type"] not in LISTS:
        return text == wanted
    return texts.read_caption(text, KIND_OF) == texts.read_caption(wanted, KIND_OF)


def tally_of(rows: Iterable[dict[str, Any]], answers: Iterable[str]) -> Tally:
    tally = Tally()
    for row, text in zip(rows, answers, strict=True):
        tally.add(row["type"], is_right(row, text))
    return tally


def blind(rows: list[dict[str, Any]]) -> Tally:
    """The best that can be done without a picture: what is commonest for each wording, with the noun left out."""

    def sort(row: dict[str, Any]) -> tuple[str, str]:
        return row["type"].removesuffix("_absent"), NOUNS.sub("", row.get("question", ""))

    answers: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for row in rows:
        answers[sort(row)][row["captions"][0] if "captions" in row else row["answer"]] += 1
    return tally_of(rows, [answers[sort(row)].most_common(1)[0][0] for row in rows])


def scenes_table(rows: list[dict[str, Any]], columns: dict[str, Tally]) -> str:
    main, *others = columns
    lines = [f"| type | asked | {main} | 95 % interval | {' | '.join(others)} |", "|---|" + "---:|" * (3 + len(others))]
    for kind in TYPES:
        if not (asked := columns[main].asked[kind]):
            continue
        low, high = columns[main].interval(kind)
        rest = " | ".join(f"{columns[name].percent(kind):.1f}" for name in others)
        lines.append(f"| {kind} | {asked} | **{columns[main].percent(kind):.1f}** | {low:.1f} to {high:.1f} | {rest} |")
    return "\n".join(lines)


def share_line(name: str, right: int, total: int) -> str:
    low, high = wilson(right, max(total, 1))
    return f"| {name} | {right} of {total} | **{100 * right / max(total, 1):.1f}** | {low:.1f} to {high:.1f} |"


HEADER = "| photographs | right | % | 95 % interval |\n|---|---:|---:|---:|"


def by_kind(is_right_of: dict[str, bool], kind_of: dict[str, str]) -> str:
    """The mean of the kinds' shares, each kind counting once, and the kinds of which none is right."""
    each: dict[str, list[bool]] = defaultdict(list)
    for name, right in is_right_of.items():
        each[kind_of[name]].append(right)
    shares = {kind: sum(found) / len(found) for kind, found in each.items()}
    never = ", ".join(sorted(kind for kind, share in shares.items() if not share))
    mean = 100 * sum(shares.values()) / len(shares)
    return f"mean of {len(shares)} kinds: {mean:.1f} %; never right: {never or 'none'}"


def photographs_table(rows: list[dict[str, Any]], answers: list[str]) -> str:
    right, named = {}, {}
    for row, text in zip(rows, answers, strict=True):
        found = texts.read_caption(text, KIND_OF) or Counter()
        right[row["image"]] = set(found) == {row["type"]}
        named[row["image"]] = row["type"] in found
    kind_of = {row["image"]: row["type"] for row in rows}
    lines = [HEADER, share_line("names the kind, and no other", sum(right.values()), len(right))]
    lines += [share_line("names the kind", sum(named.values()), len(named)), "", by_kind(named, kind_of)]
    return "\n".join(lines)


def wrong_table(rows: list[dict[str, Any]], answers: list[str], count: int = 20, seed: int = 0) -> str:
    found = [(row, text) for row, text in zip(rows, answers, strict=True) if not is_right(row, text)]
    drawn = make_rng("wrong", seed).sample(found, min(count, len(found)))
    lines = ["| picture | question | right | answer |", "|---|---|---|---|"]
    for row, text in drawn:
        wanted = row["captions"][0] if "captions" in row else row["answer"]
        lines.append(f"| {Path(row['image']).stem} | {row.get('question', 'caption')} | {wanted} | {text} |")
    return "\n".join(lines)


def kind_of_photographs() -> dict[str, str]:
    """The kind in each photograph, by the name of its file."""
    return {f"{name.replace('/', '-')}.png": kind for name, kind in shown().items()}


def kind_of_scenes(rows: list[dict[str, Any]]) -> dict[str, str]:
    """The kind in each scene that shows one alone, by the name of its file."""
    kinds_of = {Path(row["image"]).name: {thing["kind"] for thing in row["objects"]} for row in rows}
    return {name: next(iter(found)) for name, found in kinds_of.items() if len(found) == 1}


def labels_table(matches: list[dict[str, Any]], kind_of: dict[str, str]) -> str:
    """``matches``: JSON lines of `blip2 match`, the best texts of each image in order. Also what ITC alone finds, whose
    best texts are among them."""
    found: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for row in matches:
        found[Path(row["image"]).name].append((row["itc_cosine"], row["text"]))
    lines = [HEADER]
    for way, order in (("match", list), ("ITC alone", lambda rows: sorted(rows, reverse=True))):
        for top in (1, 5):
            best = {name: {text for _, text in order(found[name])[:top]} for name in kind_of}
            right = {name: texts.with_article(kind) in best[name] for name, kind in kind_of.items()}
            lines.append(share_line(f"{way}, best {top}", sum(right.values()), len(right)))
            lines.append(f"<!-- {by_kind(right, kind_of)} -->")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rows", "scenes", "photographs", "labels", "wrong"))
    parser.add_argument("file", type=Path)
    parser.add_argument("answers", nargs="*")
    parser.add_argument("-o", "--out", type=Path)
    parser.add_argument("--shuffle", action="store_true")
    parser.add_argument("--captions", action="store_true")
    parser.add_argument("--count", type=int, help="rows: of the first scenes alone")
    options = parser.parse_args()
    if options.what == "rows":
        rows = rows_of(
            read(options.file)[: options.count], options.file.parent, shuffle=options.shuffle, captions=options.captions
        )
        disk.write_text(options.out, "".join(json.dumps(row) + "\n" for row in rows))
    elif options.what == "scenes":
        rows, columns = read(options.file), {}
        for number, pair in enumerate(options.answers):
            name, _, folder = pair.rpartition("=")
            columns[name or ("right" if number == 0 else folder)] = tally_of(rows, said(Path(folder), len(rows)))
        print(scenes_table(rows, columns | {"blind": blind(rows)}))
    elif options.what == "photographs":
        rows = read(options.file)
        print(photographs_table(rows, said(Path(options.answers[0]), len(rows))))
    elif options.what == "wrong":
        rows = read(options.file)
        print(wrong_table(rows, said(Path(options.answers[0]), len(rows))))
    else:
        kind_of = kind_of_scenes(read(Path(options.answers[0]))) if options.answers else kind_of_photographs()
        print(labels_table(read(options.file), kind_of))


if __name__ == "__main__":
    main()
