"""METEOR and SPICE: by the programs of ``pycocoevalcap`` where they are, else named with what they need."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from types import SimpleNamespace

import pytest

from blip2.scores import java
from blip2.scores.java import by_java

CAPTIONS = [text.split() for text in ("two cats lying on a sofa", "a dog")]
REFERENCES = [
    [text.split() for text in own]
    for own in (["two cats laying on a couch", "two cats sleeping on a pink blanket"], ["a man riding a horse"])
]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with programs, and a java that is a script in Python: ``package(text of the script)``."""

    def made(script):
        for name in ("meteor/meteor-1.5.jar", "spice/spice-1.0.jar", f"spice/lib/{java.CORENLP}"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        program = tmp_path / "java"
        program.write_text(f"#!{sys.executable}\nimport json, sys\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(shutil, "which", lambda name: str(program))
        spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
        monkeypatch.setattr(java, "find_spec", lambda name: spec)
        return tmp_path

    return made


def test_without_java_both_are_named(monkeypatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found, missing = by_java(CAPTIONS, REFERENCES)
    assert found == {} and missing.keys() == {"METEOR", "SPICE"}
    assert all("Java" in reason for reason in missing.values())


def test_without_the_package_it_is_named(monkeypatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "java")
    monkeypatch.setattr(java, "find_spec", lambda name: None)
    assert "pip install pycocoevalcap" in by_java(CAPTIONS, REFERENCES)[1]["METEOR"]


SPEAKS = """
if "-version" in sys.argv:
    print('openjdk version "17.0.1"', file=sys.stderr)
elif "-out" in sys.argv:
    assert "--add-opens" in sys.argv
    asked = json.load(open(next(name for name in sys.argv if name.endswith("in.json"))))
    assert [row["test"] for row in asked] == ["two cats lying on a sofa", "a dog"]
    rows = [{"image_id": row["image_id"], "scores": {"All": {"f": 0.25 * len(row["refs"])}}} for row in asked]
    json.dump(rows[::-1], open(sys.argv[sys.argv.index("-out") + 1], "w"))
else:
    for line in sys.stdin:
        parts = line.rstrip("\\n").split(" ||| ")
        if parts[0] == "SCORE":
            print(len(parts))
        else:
            print("\\n".join(["0.5"] * (len(parts) - 1) + ["0.125"]))
"""


def test_what_the_programs_are_asked_and_say(package) -> None:
    package(SPEAKS)
    assert by_java(CAPTIONS, REFERENCES) == ({"METEOR": 0.125, "SPICE": 0.375}, {})


@pytest.mark.parametrize("script", ["sys.exit('it is broken')", "pass", "print('words')"])
def test_programs_that_fail_are_named(package, script) -> None:
    package(script)
    found, missing = by_java(CAPTIONS, REFERENCES)
    assert found == {} and all("program failed" in reason for reason in missing.values())


def test_spice_without_its_parser(package) -> None:
    (package(SPEAKS) / "spice" / "lib" / java.CORENLP).unlink()
    found, missing = by_java(CAPTIONS, REFERENCES)
    assert found == {"METEOR": 0.125} and "CoreNLP" in missing["SPICE"]


@pytest.mark.slow
def test_the_number_of_the_program_itself() -> None:
    """Needs Java and ``pip install --no-deps pycocoevalcap``."""
    if importlib.util.find_spec("pycocoevalcap") is None or shutil.which("java") is None:
        pytest.skip("no Java, or no pycocoevalcap here")
    assert by_java(CAPTIONS, REFERENCES)[0]["METEOR"] == pytest.approx(0.20456, abs=1e-5)
    assert by_java([[], *CAPTIONS[1:]], REFERENCES)[0]["METEOR"] < 0.03  # an empty caption is no error
