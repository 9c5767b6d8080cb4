"""Loading holds the finished model and little beside it, whatever the precision of the file and of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blip2 import checkpoint
from blip2.config import Blip2Config, T5Config
from blip2.model import Blip2
from tests import tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from Linux"),
]
PROGRAM = """
import json, re, sys
from pathlib import Path
from blip2 import checkpoint, placement

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

checkpoint.load(Path(sys.argv[3]), quantize=sys.argv[2] if sys.argv[2] != "None" else None)  # warms up
before = peak()
model = checkpoint.load(Path(sys.argv[1]), quantize=sys.argv[2] if sys.argv[2] != "None" else None)
print(json.dumps(peak() - before))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Layers of Flan-T5-XL's width: 210 million parameters, 840 MB in float32."""
    torch.manual_seed(0)
    language = T5Config(vocab_size=8192, num_layers=2, num_decoder_layers=2)
    folder = tmp_path_factory.mktemp("wide")
    checkpoint.save(Blip2(Blip2Config(tiny.VISION, tiny.QFORMER, language)), folder)
    return folder


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_the_peak_is_the_finished_model_and_two_tensors(folder: Path, quantize: str | None, tmp_path: Path) -> None:
    model = checkpoint.load(folder, quantize=quantize)
    finished = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    largest = max(parameter.nbytes for parameter in checkpoint.load(folder).parameters())
    small = tiny.save_generative("t5", tmp_path)
    command = [sys.executable, "-c", PROGRAM, str(folder), str(quantize), str(small)]
    peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"\n{quantize}: {finished / 1e6:.0f} MB in the end, {peak / 1e6:.0f} MB at most")
    assert 0.9 * finished < peak < 1.05 * finished + 2.5 * largest
