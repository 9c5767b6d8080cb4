"""The port that the server listens at."""

from __future__ import annotations

import asyncio
import socket

from blip2.serve.run import listen


def test_small_pieces_are_sent_at_once():
    """Else an answer of a head and a body waits for the client to confirm the head, which clients do after 40 ms."""

    async def options_of_a_connection() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = listen("127.0.0.1", 0)
        async with await asyncio.start_server(connected, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            try:
                return await found
            finally:
                writer.close()

    assert asyncio.run(options_of_a_connection()) == 1
