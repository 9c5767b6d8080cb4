"""Compile the C kernels next to their source. Installing the package does this if there is a compiler.

    python blip2/native/build.py

Needs nothing but the standard library. Without the result everything works as well, by torch's own functions.

The result is for every processor of its kind: there is no ``-march``, and which instructions a processor has is asked
when the library is loaded (``blip2_prepare``). What is compiled here is what a wheel carries.
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
IS_MAC = sys.platform == "darwin"
FLAGS = (
    "-std=c11", "-O3", "-fPIC", *(("-Xpreprocessor",) if IS_MAC else ()), "-fopenmp",
    "-fno-math-errno", "-fno-trapping-math",
    # A product is rounded where the source says so, on any processor: the same results everywhere.
    "-ffp-contract=off",
)  # fmt: skip
# Not linked with OpenMP: its functions are those that torch has loaded, so that there is one thread pool.
LINK_FLAGS = ("-shared", *(("-undefined", "dynamic_lookup") if IS_MAC else ()), "-lm")
CLANGS_OPENMP = b"__kmpc_fork_call"
"""What clang's programs need from OpenMP: torch's builds for Linux have GCC's, those for Macs have it."""


class NoKernelsError(Exception):
    """The reason why there are no kernels, in one line."""


def source_crc32() -> int:
    """Of the source and the compiler flags; a library contains it, so that an outdated one is not used."""
    return zlib.crc32(SOURCE.read_bytes() + INCLUDED.read_bytes(), zlib.crc32(repr(FLAGS).encode()))


def build() -> Path | None:
    """Compile. Returns the library's path; or None, after a line on standard error, if that is not possible."""
    try:
        _compile()
    except NoKernelsError as reason:
        sys.stderr.write(f"blip2: no C kernels, torch's functions are used instead: {reason}\n")
        return None
    return LIBRARY


def _compile() -> None:
    if sys.platform not in ("linux", "darwin"):  # MSVC lacks C11 and has a long of 32 bits
        raise NoKernelsError(f"they support Linux and macOS, not {sys.platform}")
    name = os.environ.get("CC", "cc")
    if (compiler := shutil.which(name)) is None:
        raise NoKernelsError(f"there is no C compiler {name!r}; install gcc, or set CC")
    unfinished = [LIBRARY.with_name(f"kernels.{os.getpid()}{ending}") for ending in (".o", ".so")]
    steps = (
        [*FLAGS, f"-DBLIP2_SOURCE={source_crc32()}u", "-c", str(SOURCE), "-o", str(unfinished[0])],
        [str(unfinished[0]), *LINK_FLAGS, "-o", str(unfinished[1])],
    )
    try:
        for step in steps:
            subprocess.run([compiler, *step], check=True, capture_output=True, text=True)
        if not IS_MAC and CLANGS_OPENMP in unfinished[1].read_bytes():
            raise NoKernelsError(f"{compiler} is clang, whose OpenMP differs from torch's; set CC to a gcc")
        with unfinished[1].open("rb+") as file:
            os.fsync(file.fileno())  # not by `blip2.disk`: this file runs alone
        os.replace(unfinished[1], LIBRARY)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.splitlines() or [f"exit code {error.returncode}"]
        wrong = next((line for line in lines if "error" in line), lines[0])
        raise NoKernelsError(f"{compiler} failed: {wrong.strip()}") from error
    finally:
        for path in unfinished:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(0 if build() else 1)
