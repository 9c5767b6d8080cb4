"""The programs of the published model card, with another import line and another place of the checkpoint."""

from __future__ import annotations

import sys
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

# Two of them misspell the class; that is corrected here.
CPU = """
import requests
from PIL import Image
from transformers import BlipProcessor, Blip2ForConditionalGeneration

processor = BlipProcessor.from_pretrained("Salesforce/blip2-flan-t5-xxl")
model = Blip2ForConditionalGeneration.from_pretrained("Salesforce/blip2-flan-t5-xxl")

img_url = 'https://storage.googleapis.com/sfr-vision-language-research/BLIP/demo.jpg'
raw_image = Image.open(requests.get(img_url, stream=True).raw).convert('RGB')

question = "how many dogs are in the picture?"
inputs = processor(raw_image, question, return_tensors="pt")

out = model.generate(**inputs)
print(processor.decode(out[0], skip_special_tokens=True))
"""
GPU = CPU.replace("import BlipProcessor", "import Blip2Processor").replace("= BlipProcessor", "= Blip2Processor")
GPU = GPU.replace('xxl")\n\nimg', 'xxl", device_map="auto")\n\nimg').replace('"pt")', '"pt").to("cuda")')
HALF = "import torch\n" + GPU.replace('device_map="auto"', 'torch_dtype=torch.float16, device_map="auto"')
HALF = HALF.replace('.to("cuda")', '.to("cuda", torch.float16)')
INT8 = HALF.replace("torch_dtype=torch.float16", "load_in_8bit=True")
PROGRAMS = {"cpu": CPU, "gpu": GPU, "gpu, float16": HALF, "gpu, int8": INT8}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.filterwarnings("ignore:float16 is not supported on a CPU")
def test_program(program, any_model, pictures, monkeypatch, capsys):
    code = PROGRAMS[program].replace("from transformers", "from blip2")
    code = code.replace("Salesforce/blip2-flan-t5-xxl", str(any_model))
    if not torch.cuda.is_available():
        code = code.replace('.to("cuda"', '.to("cpu"')
    picture = BytesIO(Path(pictures[0]).read_bytes())
    fetch = SimpleNamespace(get=lambda url, stream: SimpleNamespace(raw=picture))
    monkeypatch.setitem(sys.modules, "requests", fetch)
    names: dict = {}
    exec(code, names)
    assert capsys.readouterr().out.strip()
    assert names["out"].dtype == torch.int64 and names["out"].shape[1] <= 20 + names["inputs"]["input_ids"].shape[1]


def test_the_programs_are_four():
    assert len(set(PROGRAMS.values())) == 4
    assert 'device_map="auto"' not in CPU and 'device_map="auto"' in GPU
    assert "load_in_8bit=True, device_map" in INT8 and '.to("cuda", torch.float16)' in INT8
