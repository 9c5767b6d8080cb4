"""Whether the server of this container is ready: exit code 0 if /ready says so, at its socket or else at its port."""

from __future__ import annotations

import http.client
import os
import socket
import sys

SOCKET = os.environ.get("BLIP2_SOCKET", "/run/blip2/blip2.sock")
PORT = 8000


def main() -> None:
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=4)
    try:
        if os.path.exists(SOCKET):
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.settimeout(4)
            connection.sock.connect(SOCKET)
        connection.request("GET", "/ready")
        answer = connection.getresponse()
    except (OSError, http.client.HTTPException) as error:
        sys.exit(f"no answer: {error}")
    sys.exit(0 if answer.status == 200 else f"{answer.status}: {answer.read(500)!r}")


if __name__ == "__main__":
    main()
