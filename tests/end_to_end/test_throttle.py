"""The slow link of the other tests is as slow as it says."""

from __future__ import annotations

import socket
import threading
import time

from tests.end_to_end.throttle import SlowLink


def test_the_proxy_keeps_its_rate_and_lets_small_messages_past_large_ones() -> None:
    """400 kB at 400 kB/s take a second; meanwhile a byte on another connection is answered."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        echo = threading.Thread(target=_answer, args=(server, 2), daemon=True)
        echo.start()
        with SlowLink(f"127.0.0.1:{server.getsockname()[1]}", up=400_000) as link:
            host, _, port = link.address.partition(":")
            with (
                socket.create_connection((host, int(port))) as large,
                socket.create_connection((host, int(port))) as small,
            ):
                began = time.monotonic()
                sender = threading.Thread(target=large.sendall, args=(b"x" * 400_000,), daemon=True)
                sender.start()
                small.sendall(b"y" * 1000)
                assert small.recv(1) == b"!"
                after_small = time.monotonic() - began
                left = 399
                while left:
                    left -= len(large.recv(left))
                assert time.monotonic() - began >= 0.95 > after_small
        assert link.passed[0] == 401_000


def _answer(server: socket.socket, connections: int) -> None:
    """One byte back for each thousand."""

    def serve(connection: socket.socket) -> None:
        with connection:
            taken = answered = 0
            while piece := connection.recv(1 << 16):
                taken += len(piece)
                connection.sendall(b"!" * (taken // 1000 - answered))
                answered = taken // 1000

    for _ in range(connections):
        connection, _ = server.accept()
        threading.Thread(target=serve, args=(connection,), daemon=True).start()
