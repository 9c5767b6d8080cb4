"""The code of the documents: what is shown in blocks of Markdown, and how it is tried.

``console`` blocks are commands that run as they stand, with what they print; ``python`` blocks run. What is only to be
read, or needs the network, stands in a block of another language (``sh``, ``toml``, ``json``, ``text``).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

from click.testing import CliRunner, Result

from blip2.cli import cli

ROOT = Path(__file__).parents[1]
EXAMPLES = {"picture": "two dogs and a boat", "cats": "four cats, two dogs and a flower", "flowers": "two flowers"}
BUNDLED = {
    r"Salesforce/blip2-itm-[\w.-]+": "miniature-itm",
    r"Salesforce/[\w.-]+": "miniature",
    "google/siglip-base-patch16-224": "miniature",
    "facebook/opt-125m": "miniature --qformer miniature-itm",
}
"""What the bundled models stand for."""
NUMBER = re.compile(r"-?\d+\.\d+")


class Command(NamedTuple):
    line: str
    """As it is shown, without the prompt."""
    output: str
    """What it is said to print; "" where nothing is shown."""


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def commands(text: str) -> list[Command]:
    """Of all console blocks, in order; two that are joined by && are two."""
    found = []
    for block in blocks(text, "console"):
        for shown in block.removeprefix("$ ").split("\n$ "):
            line, _, output = shown.partition("\n")
            *first, last = line.split(" && ")
            found += [Command(each, "") for each in first] + [Command(last, output.strip("\n"))]
    return found


def prepare(folder: Path) -> None:
    """What commands of the documents work on, in ``folder``."""
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    for place in ("photos", "coco"):
        (folder / place).mkdir()
        for name in EXAMPLES:
            shutil.copy(ROOT / f"examples/{name}.png", folder / place)
    shutil.copy(ROOT / "examples/cats.png", folder / "photo.jpg")
    (folder / "animals.txt").write_text("two dogs\na cat\na boat\na flower\n")
    rows = [{"image": f"photos/{name}.png", "question": "is there a dog?", "answer": "yes"} for name in EXAMPLES]
    (folder / "vqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pictures = [
        {"filepath": "", "filename": f"{name}.png", "split": split, "sentences": [{"raw": text}]}
        for split in ("train", "val")
        for name, text in EXAMPLES.items()
    ]
    (folder / "dataset_coco.json").write_text(json.dumps({"dataset": "coco", "images": pictures}))
    rows = [{"image": f"coco/{name}.png", "captions": [text]} for name, text in EXAMPLES.items()]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _collections(folder)


def _collections(folder: Path) -> None:
    """Two shards and a table, where what writes them is installed."""
    try:
        import pyarrow
        import webdataset
        from pyarrow import parquet
    except ImportError:
        return
    (folder / "shards").mkdir()
    content = {name: (ROOT / f"examples/{name}.png").read_bytes() for name in EXAMPLES}
    for number in range(2):
        with webdataset.TarWriter(str(folder / f"shards/{number:03}.tar")) as tar:
            for place, name in enumerate(content):
                tar.write({"__key__": f"{number:03}{place:06}", "png": content[name]})
    table = pyarrow.Table.from_pylist([{"image": {"bytes": each, "path": None}} for each in content.values()])
    parquet.write_table(table, folder / "data.parquet")


def write_recipes(text: str) -> list[str]:
    """The recipes that a document shows, those that begin with their name; of a few steps and rows."""
    written = []
    for block in blocks(text, "toml"):
        name = re.match(r"# (\w+\.toml)\n", block)
        if name:
            recipe = re.sub(r"(?m)^steps = .*$", "steps = 3", block)
            recipe = re.sub(r"(?m)^batch_size = \d+", "batch_size = 2", recipe)
            Path(name[1]).write_text(re.sub(r"(?m)^warmup_steps = .*$", "warmup_steps = 1", recipe))
            written.append(name[1])
    return written


def run(command: Command) -> Result:
    """A line of `blip2` within this process, perhaps with a printf that writes its input."""
    line = command.line
    for there, here in BUNDLED.items():
        line = re.sub(there, here, line)
    questions, _, verb = line.rpartition("blip2 ")
    is_whole = re.fullmatch(r"(printf '[^']*' \| )?", questions)
    assert is_whole, f"{command.line}: only blip2 runs here; show it in an sh block"
    given = questions.removeprefix("printf '").removesuffix("' | ").replace("\\n", "\n")
    return CliRunner().invoke(cli, shlex.split(verb, comments=True), input=given)


def check(command: Command, done: Result, folder: Path) -> None:
    """It ended well and printed what is shown; places and last digits may differ."""
    assert done.exit_code == 0, (command.line, done.output)
    if not command.output:
        return
    printed = done.stdout.strip("\n").replace(str(folder), "/home/you/blip2").splitlines()
    for line, expected in zip(printed, command.output.splitlines(), strict=True):
        assert NUMBER.sub("#", line) == NUMBER.sub("#", expected), command.line
        found, shown = ([float(number) for number in NUMBER.findall(each)] for each in (line, expected))
        assert all(abs(a - b) <= 0.02 for a, b in zip(found, shown, strict=True)), command.line


def run_python(code: str, name: str) -> None:
    """A block of Python, with the bundled model in the place of published ones, and the CPU in that of the GPU."""
    for there, here in BUNDLED.items():
        code = re.sub(rf'"{there}"', f'"{here}"', code)
    code = code.replace('device="cuda", dtype="float16"', 'device="cpu", dtype="bfloat16"')
    model = "model = blip2.load()\n" if "model." in code and "model =" not in code else ""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    exec(compile(f"import blip2\n{model}{code}", name, "exec"), {})
