"""What a task on one of asyncio's own event loops awaits while its call runs.

A future wakes its task in the loop's next turn, and before that the loop asks its selector once
more, which takes as long as the whole of a tiny call's pickling. The callback that has read an
outcome has nothing else to do afterwards, so it lets the task go on itself: ``resume``.
"""

from __future__ import annotations

import asyncio

__all__ = ["Answer", "awaitable_on"]


class Answer(asyncio.Future[None]):
    """A future for the one task that awaits it, which says nothing but that the task goes on."""

    def resume(self) -> None:
        """Let the task go on now. From a callback of its loop, when that has done all else."""
        waiting = self._callbacks  # private: set_result() would hand the wake-up to the loop
        if not waiting:
            self.set_result(None)
            return
        try:
            self.remove_done_callback(waiting[0][0])
            self.set_result(None)
            # In no variable: the task may keep an error whose traceback has this frame as well.
            waiting[0][1].run(waiting.pop()[0], self)
        finally:
            if waiting:  # a signal handler has raised: the loop wakes the task
                wake, context = waiting.pop()
                self.remove_done_callback(wake)
                if not self.done():
                    self.set_result(None)
                self.get_loop().call_soon(wake, self, context=context)


def awaitable_on(home: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
    """What is quickest there: uvloop wakes a task that awaits one of its futures sooner."""
    if isinstance(home, asyncio.BaseEventLoop):
        return Answer(loop=home)
    return home.create_future()
