"""A folder in which work functions say that they have begun, and wait until a test lets them go."""

from __future__ import annotations

from pathlib import Path

from tests.waiting import async_wait_until, wait_until

__all__ = ["Stage"]


class Stage:
    """The test's side of ``jobs.begin`` and ``jobs.hold``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begun(self) -> list[str]:
        """The names of those that have begun, in order."""
        path = self.folder / "begun"
        return path.read_text().splitlines() if path.exists() else []

    def wait_begun(self, *names: str) -> None:
        """Wait until all of ``names`` have begun."""
        wait_until(lambda: set(names) <= set(self.begun()), message=lambda: f"{self.begun()}")

    async def wait_begun_async(self, *names: str) -> None:
        """Do as ``wait_begun``, in a coroutine."""
        await async_wait_until(
            lambda: set(names) <= set(self.begun()), message=lambda: f"{self.begun()}"
        )

    def pid(self, name: str) -> int:
        """The process that runs ``jobs.hold_worker`` under this name; it has begun."""
        return int((self.folder / name).read_text())

    def let_go(self, *names: str) -> None:
        """Let those of these names return; without names, everybody."""
        for name in names:
            (self.folder / f"go-{name}").touch()
        if not names:
            (self.folder / "go").touch()
