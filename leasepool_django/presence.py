"""Whether this process can be seen by ``manage.py leasepool status``: as long as a manager runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from .conf import project_name
from .engine import AT_REST

if TYPE_CHECKING:
    from .engine import ManagerStats
    from .status import Publisher

__all__ = ["Presence"]

logger = logging.getLogger(__name__)


class _Manager(Protocol):
    alias: str
    publishes_status: bool

    @property
    def state(self) -> str: ...

    def stats(self) -> ManagerStats: ...


class Presence:
    """Begins and ends the answers of one process. ``managers`` gives those that there are."""

    def __init__(self, managers: Callable[[], Sequence[_Manager]]) -> None:
        self._managers = managers
        self._set_up()

    def _set_up(self) -> None:
        self._lock = threading.Lock()  # guards the others
        self._busy: list[_Manager] = []  # those that are starting
        self._publisher: Publisher | None = None
        self._warned = False  # that there can be none

    @contextmanager
    def while_starting(self, manager: _Manager) -> Iterator[None]:
        """Be seen meanwhile, for what takes long is of interest; and then, if it runs."""
        with self._lock:
            self._busy.append(manager)
        try:
            self.settle()
            yield
        finally:
            with self._lock:
                if manager in self._busy:  # or this is a child that was forked meanwhile
                    self._busy.remove(manager)
            self.settle()

    def forget(self) -> None:
        """In a forked child: its copy of the socket is closed by ``status`` itself."""
        self._set_up()

    def settle(self) -> None:
        """Begin to answer, or end it, as the managers are now."""
        trouble = ""
        with self._lock:
            wanted = any(
                manager.publishes_status and (manager in self._busy or manager.state not in AT_REST)
                for manager in self._managers()
            )
            if wanted and self._publisher is None:
                from .status import publish  # much to load for processes that use no pool

                self._publisher, trouble = publish(self._snapshots, project_name())
                if self._warned:
                    trouble = ""  # once is enough, until it has been possible
                self._warned = self._publisher is None
            elif not wanted and self._publisher is not None:
                self._publisher.close()
                self._publisher = None
        if trouble:  # without the lock, for a log handler may use a pool
            logger.warning(
                "manage.py leasepool status will not show this process: %s. Where it need not, set "
                "PUBLISH_STATUS to False.",
                trouble,
            )

    def _snapshots(self) -> dict[str, ManagerStats]:
        return {m.alias: m.stats() for m in self._managers() if m.publishes_status}
