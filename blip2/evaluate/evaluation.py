"""An evaluation: the outputs of a model compared with references."""

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
from blip2.evaluate.examples import ANSWERS, Example, answers, outputs, texts_of
from blip2.evaluate.protocol import Facts
from blip2.evaluate.report import Outputs
from blip2.plaintext import read_lines
from blip2.scores import paired

SCORES = "scores.json"
MOST_SHOWN = 20
"""Number of listed rows whose answer differs from another model's."""
OTHER_RULE = {"official": "lavis", "lavis": "official"}
"""The second rule for answers to benchmarks."""
OnSeen = Callable[[int, int], None]
WHERE: dict[str, Any] = {"key_column": "row", "image_column": "image", "format": "jsonl"}


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that has been checked and can start. ``run``: collects the model's outputs; calling it again
    resumes, after `see`. ``rows``: the file. ``benchmark`` and ``facts``: for a benchmark, and what its report states
    beside the scores."""

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
        """Number of rows without a result. Raises CollectionError."""
        path = self.folder / ANSWERS
        return len(self.examples) - (sum(1 for _ in read_lines(path)) if path.exists() else 0)

    def see(self, on_progress: OnSeen = lambda done, total: None) -> None:
        """For a retrieval, compute the vectors of all images and texts before the run. Raises CollectionError."""
        if self.nearest is not None:
            matching.see(self.run, self.nearest, on_progress)

    def scores(self, against: Path | None = None) -> dict[str, Any]:
        """Compute the scores; also writes scores.json and report.html. ``against``: the folder of another model's
        evaluation of the same rows. Raises CollectionError if answers are missing or belong to other rows."""
        compared, examples, ours, theirs = self._compared(against)
        found: dict[str, Any] = {"rows": len(self.examples), **compared}
        if self.facts is not None:
            found |= self.facts.as_dict(found["scores"])
        disk.write_text(self.folder / SCORES, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        report.write(self.folder, self.rows, found, examples, ours, theirs)
        return found

    def _compared(self, against: Path | None) -> tuple[dict[str, Any], Sequence[Example], Outputs, Outputs | None]:
        """The scores, and for the page the rows, this model's outputs, and those of another model."""
        if self.nearest is not None or (self.benchmark is not None and self.benchmark.task == PAIR):
            if against is not None:
                raise OptionError(f"{option('against')} compares answers, but a matching model gives none")
            shown: tuple[Sequence[Example], Outputs]
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
        ours = Outputs(texts, scored.each, sure, "CIDEr" if self.examples[0].question is None else "accuracy")
        theirs = None
        if against is not None:
            found["against"], theirs = self._comparison(against, ours)
        return found, self.examples, ours, theirs

    def _comparison(self, against: Path, ours: Outputs) -> tuple[dict[str, Any], Outputs]:
        others = outputs(against, len(self.examples))
        theirs = Outputs(others, compared(self.examples, others, self.rule, java=False).each)
        both = [(a, b, example.image) for a, b, example in zip(ours.each, theirs.each, self.examples, strict=True)
                if a is not None and b is not None]  # fmt: skip
        if not both:
            raise OptionError(f"{option('against')} compares scores, but the answers to these rows are not published")
        changed = [
            {"row": row, "was": before, "is": now}
            for row, (before, now) in enumerate(zip(others, ours.texts, strict=True))
            if before != now
        ]
        own, other, images = zip(*both, strict=True)
        return {
            "folder": str(against), "mean": sum(other) / len(other), "changed": len(changed),
            "better": sum(a > b for a, b, _ in both), "worse": sum(a < b for a, b, _ in both),
            "p": paired(own, other, images), "first_changed": changed[:MOST_SHOWN],
        }, theirs  # fmt: skip
