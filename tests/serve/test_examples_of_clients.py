"""Every file of examples/clients against a real server, where its library is installed.

BLIP2_CLIENTS_PYTHON names an interpreter that has the Python libraries (else this one is asked), and
BLIP2_CLIENTS_NODE a folder in which ``npm install`` was run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.conftest import PICTURES, Running

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples/clients").glob("ask_*"))
PYTHON = os.environ.get("BLIP2_CLIENTS_PYTHON", sys.executable)
NODE_FOLDER = Path(os.environ.get("BLIP2_CLIENTS_NODE", ROOT))
QUESTION = "what is in the picture?"

pytestmark = pytest.mark.slow


def command_of(example: Path, folder: Path) -> list[str]:
    """How an example is run; the test is skipped if a library is missing."""
    if example.suffix == ".py":
        names = re.findall(r"^(?:from|import) (\w+)", example.read_text(), re.MULTILINE)
        if subprocess.run([PYTHON, "-c", f"import {', '.join(names)}"], capture_output=True).returncode:
            pytest.skip(f"one of {', '.join(names)} is not installed")
        return [PYTHON, str(example)]
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    packages = [name for name in re.findall(r'from "([^"]+)"', example.read_text()) if not name.startswith("node:")]
    for name in packages:
        if not (NODE_FOLDER / "node_modules" / name).is_dir():
            pytest.skip(f"{name} is not installed in {NODE_FOLDER}")
    (folder / "node_modules").symlink_to(NODE_FOLDER / "node_modules")
    return [node, shutil.copy(example, folder)]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_a_client_with_its_defaults_gets_the_answers_of_the_pipeline(example, server: Running, models, tmp_path):
    command = [*command_of(example, tmp_path), f"{server.url}/v1", str(PICTURES[0])]
    offline = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "AI_SDK_LOG_WARNINGS": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **offline}, timeout=120)
    assert done.returncode == 0, done.stderr
    is_greedy = "temperature=0)" in example.read_text()
    whole = models.pipeline.ask(PICTURES[0], QUESTION, **({"num_beams": 1} if is_greedy else {}))
    streamed = models.pipeline.ask(PICTURES[0], QUESTION, num_beams=1)
    assert done.stdout.splitlines()[-3:] == [whole, streamed, str(models.matcher.model.config.projection_size)]
