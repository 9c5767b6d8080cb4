"""Listening on a Unix socket: a file to which programs on this machine connect, such as a reverse proxy."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from blip2.errors import OptionError

MODE = 0o660
"""Owner and group may connect. The file gets the folder's group if the folder has the setgid bit."""


@contextmanager
def listen_at(path: Path) -> Iterator[socket.socket]:
    """A listening socket, whose file is removed afterwards. The socket of a dead server is replaced.

    Raises OptionError if something else is there: a running server, or a file that is not a socket.
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
        unfinished.rename(path)  # atomic: clients never find a socket without a listener or with other permissions
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
            if os.path.samestat(path.stat(), own):  # not the socket of another server that replaced ours
                path.unlink()
        listener.close()


def _check_free(path: Path) -> None:
    with suppress(OSError):
        mode = path.lstat().st_mode
        if not stat.S_ISSOCK(mode):
            kind = "folder" if stat.S_ISDIR(mode) else "file"
            raise OptionError(f"--uds {path}: a {kind} already exists there; choose another name")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(1)
        try:
            client.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return  # there is no file, or its server is dead
        except OSError as error:  # too long a name fails here: renaming would work, but not connecting
            raise OptionError(
                f"--uds {path} cannot be opened ({error.strerror or error}); choose another file"
            ) from None
    raise OptionError(f"--uds {path}: another server is listening there; stop it, or choose another file")
