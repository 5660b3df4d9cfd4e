"""A slow link in user space: a TCP proxy that lets so many bytes a second pass, all its connections together."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from types import TracebackType

__all__ = ["SlowLink"]

_PIECE = 4096  # bytes: connections take turns after so many, so that a heartbeat gets past an upload
_BUFFER = 1 << 16  # bytes that the proxy takes before they may pass: as little as a modem does


class _Lane:
    """One direction."""

    def __init__(self, rate: float) -> None:
        self.rate, self.passed = rate, 0
        self._free_at = 0.0

    async def wait(self, size: int) -> None:
        """Until so many bytes have passed behind those of everybody who came before."""
        self.passed += size
        now = asyncio.get_running_loop().time()
        self._free_at = max(self._free_at, now) + size / self.rate
        if self._free_at > now:
            await asyncio.sleep(self._free_at - now)


class SlowLink:
    """Listens on a free port of 127.0.0.1 and passes on to `target`; a context manager.

    Args:
        target: "host:port".
        up: Bytes a second towards the target.
        down: Bytes a second back.
    """

    def __init__(self, target: str, *, up: float = float("inf"), down: float = float("inf")) -> None:
        self._host, _, port = target.partition(":")
        self._port = int(port)
        self._up, self._down = _Lane(up), _Lane(down)
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)  # what is accepted inherits it
        #: Where it listens.
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run, name="slow-link")

    @property
    def passed(self) -> tuple[int, int]:
        """Bytes so far, up and down."""
        return self._up.passed, self._down.passed

    def become(self, *, up: float) -> None:
        """From now on let so many bytes a second pass towards the target."""
        self._up.rate = up

    def __enter__(self) -> SlowLink:
        """Begin to listen."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cut all connections, and end the thread."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        open_now: set[asyncio.Task[None]] = set()

        def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.get_running_loop().create_task(self._connection(reader, writer))
            open_now.add(task)
            task.add_done_callback(open_now.discard)

        server = await asyncio.start_server(accepted, sock=self._listening, limit=_BUFFER)
        await self._stop.wait()
        server.close()
        for task in open_now:
            task.cancel()
        await asyncio.gather(*open_now, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            try:
                there, back = await asyncio.open_connection(self._host, self._port, limit=_BUFFER)
            except OSError:
                writer.transport.abort()
                return
            try:
                await asyncio.gather(_pass_on(reader, back, self._up), _pass_on(there, writer, self._down))
            finally:
                writer.transport.abort()
                back.transport.abort()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lane: _Lane) -> None:
    while piece := await reader.read(_PIECE):
        await lane.wait(len(piece))
        writer.write(piece)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
