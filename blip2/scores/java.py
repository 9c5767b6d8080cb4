"""METEOR and SPICE, which are Java programs in the installed package ``pycocoevalcap``.

The programs have their own licences (LGPL, AGPL) and are not part of this package. SPICE needs Stanford's CoreNLP, 385
MB, which ``pycocoevalcap`` downloads when SPICE is first used through it, and Java 8 or 11, since it does not run on
later versions.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "pycocoevalcap"
METEOR, SPICE = "METEOR", "SPICE"
CORENLP = "stanford-corenlp-3.6.0.jar"
OPENS = ("--add-opens", "java.base/java.lang=ALL-UNNAMED")
LONGEST_REASON = 120

Tokens = Sequence[str]


class _Failed(Exception):
    """The reason why there is no score."""


def by_java(
    captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]
) -> tuple[dict[str, float], dict[str, str]]:
    """The scores of all captions, 0 to 1, by name; and by name the reason if one cannot be computed."""
    found: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name, compute in ((METEOR, _meteor), (SPICE, _spice)):
        try:
            found[name] = compute(*_where(name), captions, references)
        except _Failed as error:
            missing[name] = str(error)
        except (OSError, ValueError, LookupError, TypeError) as error:
            missing[name] = f"the program failed ({str(error)[:LONGEST_REASON]})"
    return found, missing


def _where(name: str) -> tuple[str, Path]:
    """Java, and the folder of the program. Raises _Failed."""
    if (java := shutil.which("java")) is None:
        raise _Failed("needs Java, which is not installed")
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise _Failed(f"needs its Java program: pip install {PACKAGE}")
    return java, Path(next(iter(spec.submodule_search_locations)), name.lower())


def _meteor(java: str, folder: Path, captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """From the statistics of each caption, which are then aggregated (Denkowski and Lavie, 2014): not the mean of the
    captions' own scores, which are printed first."""
    jar = folder / "meteor-1.5.jar"
    if not jar.exists():
        raise _Failed(f"needs {jar}, which is missing")
    lines = [
        " ||| ".join(["SCORE", *map(_line, own), _line(caption)])
        for caption, own in zip(captions, references, strict=True)
    ]
    arguments = [java, "-jar", "-Xmx2G", jar.name, "-", "-", "-stdio", "-l", "en", "-norm"]
    stats = _run(arguments, folder, lines, len(lines))
    return float(_run(arguments, folder, [" ||| ".join(["EVAL", *stats])], len(lines) + 1)[-1])


def _line(words: Tokens) -> str:
    return " ".join(words).replace("|||", "")


def _run(arguments: Sequence[str], folder: Path, lines: Sequence[str], number: int) -> list[str]:
    """The first ``number`` output lines of a program for these input lines. Raises _Failed."""
    text = "\n".join(lines) + "\n"
    done = subprocess.run(arguments, cwd=folder, input=text, capture_output=True, encoding="utf-8", check=False)
    found = done.stdout.splitlines()
    if done.returncode or len(found) < number:
        raise _Failed(f"the program failed ({_last_line(done.stderr)})")
    return found[:number]


def _spice(java: str, folder: Path, captions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """From scene graphs (Anderson et al., 2016): the mean of the captions' F-scores."""
    if not (jar := folder / "spice-1.0.jar").exists():
        raise _Failed(f"needs {jar}, which is missing")
    if not (parser := folder / "lib" / CORENLP).exists():
        raise _Failed(f"needs Stanford's CoreNLP 3.6.0 (385 MB) as {parser}, and Java 8 or 11")
    asked = [
        {"image_id": number, "test": " ".join(caption), "refs": [" ".join(text) for text in own]}
        for number, (caption, own) in enumerate(zip(captions, references, strict=True))
    ]
    with tempfile.TemporaryDirectory() as temporary:
        given, made = Path(temporary, "in.json"), Path(temporary, "out.json")
        given.write_text(json.dumps(asked), encoding="utf-8")
        arguments = [java, *(OPENS if _version(java) > 8 else ()), "-Xmx8G", "-jar", jar.name, str(given),
                     "-cache", temporary, "-out", str(made), "-subset", "-silent"]  # fmt: skip
        done = subprocess.run(arguments, cwd=folder, capture_output=True, encoding="utf-8", check=False)
        if done.returncode or not made.exists():
            raise _Failed(f"the program failed ({_last_line(done.stderr)}); it runs with Java 8 or 11")
        scores = {row["image_id"]: float(row["scores"]["All"]["f"]) for row in json.loads(made.read_text("utf-8"))}
    return sum(scores[number] for number in range(len(captions))) / len(captions)


def _version(java: str) -> int:
    """8, 11, 17; 0 if unknown."""
    output = subprocess.run([java, "-version"], capture_output=True, encoding="utf-8", check=False).stderr
    first = output.partition('"')[2].removeprefix("1.").split(".")[0].split('"')[0]
    return int(first) if first.isdigit() else 0


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][:LONGEST_REASON] if lines else "no error message"
