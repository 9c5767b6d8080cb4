"""An evaluation: what a model said, compared with what is right."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip2 import disk
from blip2.api.collect import CollectionRun
from blip2.errors import OptionError, option
from blip2.evaluate import matching, report, results
from blip2.evaluate.benchmark import ASK, PAIR, Benchmark
from blip2.evaluate.compare import by_type, compared
from blip2.evaluate.examples import ANSWERS, Example, answers, said, texts_of
from blip2.evaluate.protocol import Facts
from blip2.evaluate.report import Told
from blip2.plaintext import read_lines
from blip2.scores import paired

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
