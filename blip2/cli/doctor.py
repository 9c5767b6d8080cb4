"""``blip2 doctor``: what this installation and this machine support, what is wrong, and how to fix it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from blip2 import __version__
from blip2.cli.options import in_bytes, labelled, printing, with_options
from blip2.installed import install_line

CPU_TORCH = "pip install torch --index-url https://download.pytorch.org/whl/cpu"
PACKAGES = ("numpy", "safetensors", "tokenizers", "Pillow", "huggingface-hub")
CPU_FEATURES = {
    "AVX2": "_is_avx2_supported",
    "AVX-512": "_is_avx512_supported",
    "VNNI": "_is_vnni_supported",
    "bfloat16": "_is_avx512_bf16_supported",
    "AMX": "_is_amx_tile_supported",
}
"""Each with the function of torch.cpu that detects it. They are private: any may be missing in another version."""


@dataclass
class Finding:
    """``text`` for people, ``facts`` for programs. A ``problem`` names a remedy; a ``hint`` is only information."""

    text: str
    facts: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None
    hint: str | None = None


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@with_options()
@click.pass_context
def command(context: click.Context, /, as_json: bool) -> None:
    """Check this installation and this machine.

    Reports the torch build and whether it fits the machine, the features of the processor, whether the compiled kernels
    for quantised models are in use, and where downloads are stored. The exit code is 1 if there is a problem; each
    problem comes with a remedy. Please add the output to bug reports.

    \b
    blip2 doctor
    blip2 doctor --json
    """
    findings = examine()
    problems = [finding.problem for finding in findings.values() if finding.problem]
    if as_json:
        rows = {
            name.lower(): {"text": finding.text, **finding.facts, "problem": finding.problem, "hint": finding.hint}
            for name, finding in findings.items()
        }
        click.echo(json.dumps({"problems": len(problems), **rows}, indent=2))
    else:
        _show(findings, problems)
    context.exit(1 if problems else 0)


def examine() -> dict[str, Finding]:
    """Every check by name, in order. Without torch, only the checks that do not need it."""
    checks: dict[str, Callable[[], Finding]] = {"blip2": _package, "torch": _torch}
    try:
        import torch  # noqa: F401
    except Exception as error:  # a broken installation may raise anything
        reason = " ".join(str(error).split())
        missing = Finding(
            f"cannot be imported: {reason}", problem=f"torch is not usable; reinstall it: {_install()}"
        )
        checks = {"blip2": _package, "torch": lambda: missing, "Memory": _memory, "Install": _installation}
    else:
        checks |= {
            "Processor": _processor, "Kernels": _kernels, "Threads": _threads, "Memory": _memory, "GPU": _gpu,
            "Cache": _cache, "Network": _network, "Miniature": _miniature, "Install": _installation,
        }  # fmt: skip
    return {name: check() for name, check in checks.items()}


def _show(findings: dict[str, Finding], problems: list[str]) -> None:
    with printing() as out:
        for name, finding in findings.items():
            out.print(labelled(name, finding.text))
        for finding in findings.values():
            if finding.hint:
                out.print(labelled("Hint", finding.hint))
        out.print()
        if not problems:
            out.print("No problems found.", style="green")
        for problem in problems:
            out.print(labelled("Problem", problem), style="red")


def _package() -> Finding:
    versions = {name: metadata.version(name) for name in PACKAGES}
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    facts = {"version": __version__, "python": platform.python_version(), "packages": versions}
    return Finding(f"{__version__}, Python {platform.python_version()}, {listed}", facts)


def _torch() -> Finding:
    import torch

    build = _build()
    facts = {"version": torch.__version__, "build": build, "cuda": torch.version.cuda, "hip": torch.version.hip}
    finding = Finding(f"{torch.__version__}, built for {build}", facts)
    if build == "CPU" and has_nvidia():
        finding.problem = (
            "there is an NVIDIA GPU, but this torch is built for the CPU only; replace it: "
            "pip uninstall torch, then pip install torch"
        )
    elif build != "CPU" and not torch.cuda.is_available() and not has_nvidia():
        finding.hint = (
            f"this torch is built for {build}, and there is no GPU; the CPU build is much smaller: "
            f"pip uninstall torch, then {CPU_TORCH}"
        )
    return finding


def _processor() -> Finding:
    import torch

    features = [name for name, function in CPU_FEATURES.items() if getattr(torch.cpu, function, bool)()]
    name = _processor_name()
    facts = {"name": name, "processors": os.cpu_count(), "features": features}
    return Finding(f"{name}, {os.cpu_count()} cores; {', '.join(features) or 'no vector instructions known'}", facts)


def _kernels() -> Finding:
    from blip2.native import LEVELS, kernels
    from blip2.native.build import LIBRARY

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # reported below
        library = kernels()
    if library is not None:
        level = LEVELS[library.blip2_prepare(len(LEVELS) - 1)]
        text = "active, " + ("the generic code: slow" if level == LEVELS[0] else f"with {level}")
        return Finding(text, {"active": True, "level": level})
    why = "compiled from other source code, or cannot be loaded here" if LIBRARY.exists() else "not compiled"
    finding = Finding(f"{why}; quantised models are slow on the CPU", {"active": False, "level": None})
    if sys.platform == "linux":
        finding.problem = (
            f"the C kernels are {why}; install a C compiler with OpenMP, such as gcc, then install blip2 again "
            f"({install_line()} --force-reinstall --no-deps; in a checkout: python blip2/native/build.py)"
        )
    return finding


def _threads() -> Finding:
    import torch

    number, available = torch.get_num_threads(), _available_processors()
    finding = Finding(f"{number} of {available}", {"threads": number, "available": available})
    if number < available:
        setting = os.environ.get("OMP_NUM_THREADS")
        hint = f"OMP_NUM_THREADS is {setting}; without it large models would use all cores"
        finding.hint = hint if setting else None
    return finding


def _memory() -> Finding:
    total, available = memory()
    text = "unknown" if total is None else in_bytes(total)
    if available is not None:
        text += f", {in_bytes(available)} available"
    return Finding(text, {"total_bytes": total, "available_bytes": available})


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        finding = Finding("none" if not has_nvidia() else "not usable", {"devices": []})
        if has_nvidia() and _build() != "CPU":
            finding.problem = (
                "there is an NVIDIA GPU, but torch cannot use it; update its driver "
                f"(this torch is built for {_build()}), or give the container access to it"
            )
        return finding
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    text = "; ".join(f"{gpu.name}, {in_bytes(gpu.total_memory)}" for gpu in found)
    return Finding(text, {"devices": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in found]})


def _cache() -> Finding:
    from blip2.checkpoint.describe import cache_folder, find
    from blip2.published import PUBLISHED

    folder = cache_folder()
    held = [name for name in PUBLISHED if find(name) is not None]
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    facts = {"folder": str(folder), "free_bytes": free, "published": held}
    finding = Finding(f"{folder}, {in_bytes(free)} free; published models: {', '.join(held) or 'none'}", facts)
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        finding.problem = f"{existing} is not writable; set HF_HOME to a folder that is"
    return finding


def _network() -> Finding:
    from blip2.checkpoint import hub

    if hub.is_offline():
        return Finding("disabled by HF_HUB_OFFLINE; only models in the cache are found", {"offline": True})
    return Finding("enabled, for models that are not in the cache", {"offline": False})


def _miniature() -> Finding:
    from blip2.checkpoint import BUNDLED
    from blip2.checkpoint.describe import stored
    from blip2.errors import CheckpointError

    try:
        sizes = {name: stored(folder).num_bytes for name, folder in BUNDLED.items()}
    except CheckpointError as error:
        how = f"install blip2 again: {install_line()} --force-reinstall --no-deps"
        return Finding("damaged", problem=f"the bundled model is damaged ({error}); {how}")
    return Finding(", ".join(f"{name} {in_bytes(size)}" for name, size in sizes.items()), {"bytes": sizes})


def _installation() -> Finding:
    return Finding(_install(), {"line": _install()})


def _install() -> str:
    """On Linux pip installs the CUDA build by default; elsewhere the CPU build."""
    if sys.platform == "linux" and not has_nvidia():
        return f"{CPU_TORCH} && {install_line()}"
    if sys.platform == "win32" and has_nvidia():
        return f"uv pip install{install_line().partition('pip install')[2]} --torch-backend=auto"
    return install_line()


def _build() -> str:
    """What torch is built for: CPU, CUDA 12.8, ROCm 6.4."""
    import torch

    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"


def has_nvidia() -> bool:
    """Whether the machine has an NVIDIA GPU, whether or not torch can use it."""
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def memory(root: Path = Path("/")) -> tuple[int | None, int | None]:
    """Total and available memory in bytes, within the limit of the container; None if unknown."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return None, None
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    total, available = sizes.get("MemTotal"), sizes.get("MemAvailable")
    try:
        limit = int((root / "sys/fs/cgroup/memory.max").read_text())  # "max" where there is none
        used = int((root / "sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return total, available
    return min(total or limit, limit), min(available or limit, max(limit - used, 0))


def _available_processors() -> int:
    """Number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
