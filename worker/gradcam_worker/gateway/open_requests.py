"""How many requests are held open at a time: waits and event streams; and forms with images."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gradcam_worker.errors import ServerBusy


class OpenRequests:
    """Counts the requests that are held open, in one event loop."""

    def __init__(
        self, limit: int, what: str = "requests are held open (GRADCAM_SERVE_OPEN_REQUESTS)"
    ) -> None:
        """`limit`: how many there may be; `what`: they are, for the error."""
        self._limit, self._what, self.count = limit, what, 0
        self.closing = asyncio.Event()  # the server stops: they are to end

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[None]:
        """Count a request while the block lasts. Raises ServerBusy if there are too many."""
        if self.count >= self._limit:
            message = f"{self.count} {self._what}."
            raise ServerBusy(message)
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1
