"""The page of questions and answers, from docs/questions.toml."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

QUESTIONS = Path(__file__).parents[1] / "questions.toml"


def questions() -> list[dict[str, Any]]:
    """Each with topic, asked, threads, answer, page (from docs/) and search."""
    return tomllib.loads(QUESTIONS.read_text("utf-8"))["question"]


def page() -> str:
    from docs.generate.repository import title_of

    found = questions()
    parts = [
        "# Questions and answers",
        f"{len(found)} questions that people ask about BLIP-2 in public threads, with the page that has more.",
    ]
    for topic in dict.fromkeys(each["topic"] for each in found):
        parts.append(f"## {topic}")
        for each in found:
            if each["topic"] == topic:
                threads = ", ".join(each["threads"])
                more = f"More: [{title_of(each['page'])}](../{each['page']})."
                parts.append(f"### {each['asked']}\n\n{each['answer']} {more} (Asked in {threads}.)")
    return "\n\n".join(parts) + "\n"
