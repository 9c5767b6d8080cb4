"""A server at a Unix socket: a file that programs of this machine, such as a reverse proxy, connect to."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from blip2.errors import OptionError

MODE = 0o660
"""Its owner and its group may connect. The group of a file is its folder's where that has the setgid bit."""


@contextmanager
def listen_at(path: Path) -> Iterator[socket.socket]:
    """A listening socket, whose file is gone afterwards. What a dead server left there is replaced.

    Raises OptionError if something else is there: a server that still answers, or a file that is no socket.
    """
    if not hasattr(socket, "AF_UNIX"):
        raise OptionError("--uds: this system has no Unix sockets; use --host and --port")
    _check_free(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    unfinished = path.with_name(f".{path.name[:8]}.{os.getpid()}")
    try:
        with suppress(FileNotFoundError):
            unfinished.unlink()
        listener.bind(str(unfinished))
        unfinished.chmod(MODE)
        listener.listen(socket.SOMAXCONN)
        unfinished.rename(path)  # in one step: nobody finds a socket at which nobody listens, or of another mode
    except (OSError, ValueError) as error:
        listener.close()
        with suppress(OSError):
            unfinished.unlink()
        reason = getattr(error, "strerror", None) or str(error)
        raise OptionError(f"--uds {path} cannot be opened ({reason}); choose another file") from None
    own = path.stat()
    try:
        yield listener
    finally:
        with suppress(OSError):
            if os.path.samestat(path.stat(), own):  # not another server's, that took its place
                path.unlink()
        listener.close()


def _check_free(path: Path) -> None:
    with suppress(OSError):
        mode = path.lstat().st_mode
        if not stat.S_ISSOCK(mode):
            kind = "folder" if stat.S_ISDIR(mode) else "file"
            raise OptionError(f"--uds {path}: there is a {kind} already, which is no socket; choose another name")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as guest:
        guest.settimeout(1)
        try:
            guest.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return  # nothing is there, or its server is dead
        except OSError as error:  # a name too long is said here: renaming would make it, and nobody could connect
            raise OptionError(
                f"--uds {path} cannot be opened ({error.strerror or error}); choose another file"
            ) from None
    raise OptionError(f"--uds {path}: a server listens there already; stop it, or choose another file")
