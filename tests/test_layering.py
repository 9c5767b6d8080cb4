"""The order of the parts, and the one room that each third party has."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "blip2"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 350

# Low to high: a part may import from the lines above its own, never from its neighbours on the line.
ORDER = [
    {"errors", "plaintext", "installed", "version"},
    {"config", "disk"},
    {"native", "linear", "threads", "tensorfile", "published"},
    {"finite", "scores", "dropout"},
    {"layers", "quantized"},
    {"image", "encoded", "vision", "convolutional", "qformer", "text", "language", "template"},
    {"model"},
    {"checkpoint", "generation", "data"},
    {"tasks", "placement", "collection"},
    {"api", "alt"},
    {"index", "evaluate"},
    {"train"},
    {"compat"},
    {"serve"},
    {"cli"},
]
RANK = {part: rank for rank, parts in enumerate(ORDER) for part in parts}
FRONT_DOORS = {"__init__", "__main__"}  # the files of the package itself: they may open any part

ROOMS = {
    "PIL": {"image"},
    "pillow_heif": {"image"},
    "tokenizers": {"text"},
    "jinja2": {"template"},
    "safetensors": {"checkpoint", "tensorfile"},
    "huggingface_hub": {"checkpoint", "train"},
    "fastapi": {"serve"},
    "uvicorn": {"serve"},
    "ray": {"api", "serve"},
    "starlette": {"serve"},
    "pydantic": {"serve"},
    "python_multipart": {"serve"},
    "prometheus_client": {"serve"},
    "accelerate": {"placement"},
    "filelock": {"disk", "index"},
    "pyarrow": {"collection"},
    "webdataset": {"collection"},
    "braceexpand": {"collection"},
    "defusedxml": {"collection"},
    "markdown_it": {"alt"},
    "tensorboard": {"train"},
    "trackio": {"train"},
    "wandb": {"train"},
    "datasets": set(),  # what tests compare collections with
    "pycocotools": set(),
    "click": {"cli"},
    "rich": {"cli"},
    "transformers": set(),  # the reference that tests compare with
}


def part_of(path: Path, package: Path = PACKAGE) -> str:
    """blip2/language/t5.py -> language; blip2/model.py -> model."""
    return path.relative_to(package).with_suffix("").parts[0]


def imports(path: Path, package: Path = PACKAGE) -> Iterator[str]:
    """The dotted names that a file imports, anywhere in it; relative ones in full."""
    folder = ["blip2", *path.relative_to(package).parent.parts]
    for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)


def offences(path: Path, package: Path = PACKAGE) -> list[str]:
    """What a file imports and should not."""
    part = part_of(path, package)
    found = []
    for name in imports(path, package):
        root, *rest = name.split(".")
        if part not in ROOMS.get(root, {part}):
            found.append(f"{name} belongs in {' and '.join(sorted(ROOMS[root])) or 'tests'}")
        if root != "blip2" or part in FRONT_DOORS or rest[:1] in ([part], ["__version__"]):
            continue
        target = rest[0] if rest else "the package itself"
        if target not in RANK:
            found.append(f"{name}: {target} is no part that the order knows")
        elif RANK[target] >= RANK[part]:
            found.append(f"{name}: {target} does not stand below {part}")
    return found


def test_every_part_has_a_place():
    assert {part_of(path) for path in FILES} <= set(RANK) | FRONT_DOORS


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_file(path):
    assert part_of(path) in FRONT_DOORS or part_of(path) in RANK
    assert offences(path) == []
    assert len(path.read_text("utf-8").splitlines()) <= MAX_LINES, "split it by concept"


@pytest.mark.parametrize(
    ("file", "line", "count"),
    [
        ("model.py", "from blip2.vision import VisionTransformer", 0),
        ("model.py", "from .vision import VisionTransformer", 0),
        ("model.py", "from . import vision, qformer", 0),
        ("vision.py", "from blip2.model import Blip2", 1),
        ("vision.py", "def late():\n    from blip2 import qformer", 1),  # a neighbour, imported inside
        ("vision.py", "from blip2 import load", 1),  # through the front door
        ("vision.py", "import blip2", 1),
        ("language/t5.py", "from ..layers import attend", 0),
        ("language/t5.py", "from .protocol import Language", 0),
        ("language/t5.py", "from ..model import Blip2", 1),
        ("language/t5.py", "from .. import text", 1),
        ("text.py", "from tokenizers import Tokenizer", 0),
        ("tasks/caption.py", "from PIL.Image import Image", 1),
        ("api.py", "import transformers", 1),
        ("api.py", "import torch.nn.functional as F", 0),
        ("cli/main.py", "import blip2.tasks.caption", 0),
        ("__init__.py", "from blip2.api import load", 0),
    ],
)
def test_the_check_itself(tmp_path, file, line, count):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(line)
    assert len(offences(path, tmp_path)) == count


def test_all_that_lasts_is_written_in_one_room():
    """`blip2.disk`: whole, synced, renamed. The kernels are compiled by a file that runs alone."""
    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {"os.replace", "os.rename", "os.fsync"}:
                found.add(path.relative_to(PACKAGE).as_posix())
    assert found == {"disk.py", "native/build.py"}


def test_importing_the_package_is_cheap():
    check = "import sys, blip2; print(sorted({'torch', 'transformers', 'PIL', 'numpy'} & set(sys.modules)))"
    command = [sys.executable, "-c", check]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == "[]"
