"""``blip2 pull``: what is fetched, and how it goes on after Ctrl-C. How a download works: tests/checkpoint."""

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blip2.checkpoint import hub
from blip2.errors import CheckpointError
from tests.checkpoint.fake_hub import COMMIT, NAME, serving

ROOT = Path(__file__).parents[2]
WEIGHTS = "model.safetensors"


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What the hub was asked for, as if there were one; it gives a folder."""
    names = []
    monkeypatch.setattr(hub, "is_offline", lambda: False)
    monkeypatch.setattr(hub, "pull", lambda *name: names.append(name) or tmp_path)
    return names


def test_the_folder_is_printed(run, asked, tmp_path):
    result = run("pull", NAME)
    assert (result.exit_code, result.stdout, result.stderr) == (0, f"{tmp_path}\n", "")
    run("pull", NAME, "--revision", "v2")
    assert asked == [(NAME, None), (NAME, "v2")]


def test_what_goes_wrong_is_one_line(run, asked, monkeypatch):
    def fail(name, revision):
        raise CheckpointError(f"{name}: no space is left")

    monkeypatch.setattr(hub, "pull", fail)
    result = run("pull", NAME)
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"blip2: {NAME}: no space is left\n")


def test_without_a_network_what_is_there_will_do(run, asked, opt_model, monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "is_offline", lambda: True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    result = run("pull", NAME)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "load it once with a network and without HF_HUB_OFFLINE" in result.stderr
    repository = tmp_path / "models--somebody--blip2-tiny"
    shutil.copytree(opt_model, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    assert run("pull", NAME).stdout == f"{repository / 'snapshots' / COMMIT}\n"
    assert asked == []


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("miniature", 1, "miniature is bundled with the package; there is nothing to download"),
        ("opt", 2, "opt is not a name on the hub, such as Salesforce/blip2-opt-2.7b"),
        ("tests/cli", 2, "tests/cli is not a name on the hub"),
    ],
)
def test_names_of_nothing_on_the_hub(run, asked, monkeypatch, name, code, words):
    monkeypatch.chdir(ROOT)
    result = run("pull", name)
    assert (result.exit_code, result.stdout) == (code, "")
    assert words in result.stderr and result.stderr.count("\n") == 1
    assert asked == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_ctrl_c_keeps_what_has_arrived(opt_model, tmp_path):
    whole = (opt_model / WEIGHTS).read_bytes()
    with serving(opt_model, cut_after={WEIGHTS: [len(whole) // 2]}, stall_after_cuts=True) as fake:
        environment = os.environ | {
            "HF_ENDPOINT": fake.url, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(tmp_path), "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip
        program = (
            "from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 1024\n"  # the model is a small one
            f"from blip2.cli import main; main(['pull', {NAME!r}])"
        )
        start = functools.partial(
            subprocess.Popen, [sys.executable, "-c", program], env=environment, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        process = start()
        end = time.monotonic() + 60
        while sum(part.stat().st_size for part in tmp_path.rglob("*.part")) < len(whole) // 4:
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output) == (130, "")
        assert errors.endswith("blip2: stopped; the downloaded data is kept, and the same command resumes\n")
        fake.cut_after.clear()
        output, errors = start().communicate(timeout=60)
    starts = [asked for file, asked in fake.asked if file == WEIGHTS]
    assert starts[0] == "" and len(starts) == 2 and int(starts[1][6:-1]) > len(whole) // 8
    assert (Path(output.strip()) / WEIGHTS).read_bytes() == whole
