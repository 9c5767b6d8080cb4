"""``blip2 doctor``: a sound machine passes; each thing that may be wrong is a problem with what to do."""

import json
import sys
from pathlib import Path

import pytest
import torch

from blip2 import native
from blip2.checkpoint import hub
from blip2.cli import doctor
from blip2.installed import install_line

CPU_LINE = "pip install torch --index-url https://download.pytorch.org/whl/cpu"


@pytest.fixture(autouse=True)
def sound(monkeypatch, tmp_path):
    """A Linux machine without a GPU, with torch's CPU build, compiled kernels and an empty cache."""

    class Library:
        def blip2_prepare(self, most):
            return most

    monkeypatch.setattr(native, "kernels", Library)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "has_nvidia", lambda: False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))


@pytest.fixture
def told(run):
    """The findings and the exit code; text and JSON tell of the same problems."""

    def examine():
        as_json, as_text = run("doctor", "--json"), run("doctor")
        findings = json.loads(as_json.stdout)
        problems = [row["problem"] for row in findings.values() if isinstance(row, dict) and row["problem"]]
        assert len(problems) == findings["problems"]
        assert as_json.exit_code == as_text.exit_code == (1 if problems else 0)
        assert as_text.stdout.count("\nProblem") == len(problems)
        assert ("No problems found." in as_text.stdout) == (not problems)
        assert as_json.stderr == as_text.stderr == ""
        return findings

    return examine


def test_all_is_well(told, tmp_path):
    findings = told()
    assert findings["problems"] == 0
    assert findings["torch"]["version"] == torch.__version__ and findings["torch"]["build"] == "CPU"
    assert findings["kernels"] | {"active": True, "level": "VNNI", "text": "active, with VNNI"} == findings["kernels"]
    assert findings["cache"]["folder"] == str(tmp_path) and findings["cache"]["published"] == []
    assert findings["network"]["offline"] is True
    assert findings["install"]["line"] == f"{CPU_LINE} && {install_line()}"


def test_kernels_on_a_lesser_processor(told, monkeypatch):
    monkeypatch.setattr(native.kernels, "blip2_prepare", lambda self, most: 1)
    assert told()["kernels"]["level"] == "AVX2"
    monkeypatch.setattr(native.kernels, "blip2_prepare", lambda self, most: 0)
    assert told()["kernels"]["text"] == "active, the generic code: slow"


def test_no_kernels(told, monkeypatch):
    monkeypatch.setattr(native, "kernels", lambda: None)
    problem = told()["kernels"]["problem"]
    assert "install a C compiler" in problem and "python blip2/native/build.py" in problem
    assert (Path(__file__).parents[2] / "blip2" / "native" / "build.py").exists()
    monkeypatch.setattr(sys, "platform", "darwin")  # where they cannot be had
    assert told()["kernels"]["problem"] is None


def test_a_cuda_build_without_a_gpu_is_worth_knowing(told, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    findings = told()
    assert findings["problems"] == 0
    assert findings["torch"]["build"] == "CUDA 12.8"
    assert CPU_LINE in findings["torch"]["hint"]


def test_a_cpu_build_beside_a_gpu(told, monkeypatch):
    monkeypatch.setattr(doctor, "has_nvidia", lambda: True)
    findings = told()
    assert findings["problems"] == 1
    assert findings["torch"]["problem"].endswith("pip uninstall torch, then pip install torch")
    assert findings["install"]["line"] == install_line()


def test_a_gpu_that_torch_cannot_use(told, monkeypatch):
    monkeypatch.setattr(doctor, "has_nvidia", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    findings = told()
    assert findings["problems"] == 1
    assert "update its driver" in findings["gpu"]["problem"]


def test_a_gpu(told, monkeypatch):
    class Properties:
        name = "Some GPU"
        total_memory = 24 * 10**9

    monkeypatch.setattr(doctor, "has_nvidia", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    findings = told()
    assert findings["problems"] == 0
    assert findings["gpu"]["text"] == "Some GPU, 24.0 GB"


def test_torch_that_cannot_be_imported(told, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    findings = told()
    assert findings["problems"] == 1
    assert f"reinstall it: {CPU_LINE}" in findings["torch"]["problem"]


def test_a_cache_that_cannot_be_written(told, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    assert told()["cache"]["problem"] == f"{tmp_path / 'file'} is not writable; set HF_HOME to a folder that is"


def test_functions_of_torch_that_are_gone(told, monkeypatch):
    for function in doctor.CPU_FEATURES.values():
        monkeypatch.delattr(torch.cpu, function, raising=False)
    findings = told()
    assert findings["processor"]["features"] == [] and findings["problems"] == 0


def test_fewer_threads_than_processors(told, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(doctor, "_available_processors", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    findings = told()
    assert findings["threads"]["text"] == "1 of 8"
    assert "OMP_NUM_THREADS is 1" in findings["threads"]["hint"] and findings["problems"] == 0


def test_the_bundled_model(told, monkeypatch, tmp_path):
    monkeypatch.setitem(doctor_bundled(), "miniature", tmp_path)
    assert "the bundled model is damaged" in told()["miniature"]["problem"]


def doctor_bundled():
    from blip2.checkpoint import BUNDLED

    return BUNDLED


def test_memory_of_a_container(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(
        "MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 600 kB\nHugePages_Total: 0\n"
    )
    assert doctor.memory(tmp_path) == (1_024_000, 614_400)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("500000\n")
    (tmp_path / "sys/fs/cgroup/memory.current").write_text("100000\n")
    assert doctor.memory(tmp_path) == (500_000, 400_000)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert doctor.memory(tmp_path) == (1_024_000, 614_400)
    assert doctor.memory(tmp_path / "nowhere") == (None, None)
