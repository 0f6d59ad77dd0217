"""Yields to an event loop: hundreds of calls delay the rest of an app by no more than one."""

import asyncio


class LoopYielder:
    """Lets the tasks of each event loop compute one after the other; the loop runs all else between two.

    An event loop runs every task that is ready before it looks at anything else: two hundred submits that
    begin together, or fail together, would take a tenth of a second at a stretch.
    """

    def __init__(self) -> None:
        """No task waits."""
        self._locks: dict[asyncio.AbstractEventLoop, asyncio.Lock] = {}

    async def yield_to_loop(self) -> None:
        """Wait until no other task computes, then let the loop run all else once."""
        loop = asyncio.get_running_loop()
        if loop not in self._locks:
            for closed in [other for other in [*self._locks] if other.is_closed()]:
                self._locks.pop(closed, None)
            self._locks[loop] = asyncio.Lock()
        async with self._locks[loop]:
            await asyncio.sleep(0)


async def never_yield() -> None:
    """What a blocking client has in its place: it has no event loop."""
