"""Compile the C kernels next to their source: what installing the package does where there is a compiler.

    python blip2/native/build.py

Needs nothing but the standard library. Without the result everything works as well, by torch's own functions.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

SOURCE = Path(__file__).with_name("kernels.c")
INCLUDED = SOURCE.with_name("program.c")
LIBRARY = Path(__file__).with_name("kernels.so")
FLAGS = (
    "-std=c11", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math",
    # A product is rounded where the source says so, whatever the processor: the same numbers everywhere.
    "-ffp-contract=off",
)  # fmt: skip


def source_crc32() -> int:
    """Of the source and how it is compiled; a library remembers it, so that one of another source is not used."""
    return zlib.crc32(SOURCE.read_bytes() + INCLUDED.read_bytes(), zlib.crc32(repr(FLAGS).encode()))


def build() -> Path | None:
    """Compile; the library's path, or None where that is not possible (another system, no compiler, an error)."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if sys.platform != "linux" or compiler is None:
        return None
    unfinished = [LIBRARY.with_name(f"kernels.{os.getpid()}{ending}") for ending in (".o", ".so")]
    steps = (
        [compiler, *FLAGS, f"-DBLIP2_SOURCE={source_crc32()}u", "-c", str(SOURCE), "-o", str(unfinished[0])],
        # Not linked with OpenMP: its functions are those that torch has loaded, so that there is one pool of threads.
        [compiler, "-shared", str(unfinished[0]), "-o", str(unfinished[1]), "-lm"],
    )
    try:
        for step in steps:
            subprocess.run(step, check=True, capture_output=True, text=True)
        with unfinished[1].open("rb+") as file:
            os.fsync(file.fileno())  # not by `blip2.disk`: this file runs alone
        os.replace(unfinished[1], LIBRARY)
    except subprocess.CalledProcessError as error:
        sys.stderr.write(f"blip2: no C kernels, torch's functions take their place:\n{error.stderr}")
        return None
    finally:
        for path in unfinished:
            path.unlink(missing_ok=True)
    return LIBRARY


if __name__ == "__main__":
    sys.exit(0 if build() else "blip2: no C kernels: this needs Linux and a C compiler with OpenMP, such as gcc")
