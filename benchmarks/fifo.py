"""A named pipe between a cell and the functions it has running: who has begun, who may end."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["Fifo"]

PATIENCE = 20.0  # seconds


class Fifo:
    """A FIFO of its own folder, open at both ends here, so that no reader ever sees its end."""

    def __enter__(self) -> Self:
        """Make and open it."""
        self._folder = tempfile.TemporaryDirectory()
        self.path = str(Path(self._folder.name, "fifo"))
        os.mkfifo(self.path)
        self._fd = os.open(self.path, os.O_RDWR | os.O_NONBLOCK)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close and remove it."""
        os.close(self._fd)
        self._folder.cleanup()

    async def received(self) -> None:
        """Wait for one byte that a function in a worker writes."""
        loop = asyncio.get_running_loop()
        came: asyncio.Future[None] = loop.create_future()

        def read() -> None:
            if os.read(self._fd, 1) and not came.done():
                came.set_result(None)

        loop.add_reader(self._fd, read)
        try:
            await asyncio.wait_for(came, PATIENCE)
        finally:
            loop.remove_reader(self._fd)

    def send(self, count: int) -> None:
        """Write one byte for each of ``count`` functions that wait for one."""
        os.write(self._fd, b"." * count)
