"""Rules that are written once, as coroutines, and called both from asyncio and by blocking code.

A coroutine that awaits only what is ready never suspends, so `run_blocking` can run it without an event loop:
a rule over blocking I/O is a blocking function, and over asyncio's it is a coroutine.

>>> class Counter:
...     @blocking
...     async def count(self, key: str) -> int:
...         return len(await self._server.ask_each([("GET", key)]))
>>> Counter(RedisServer(settings)).count("a")  # blocks
>>> await awaited(Counter(AsyncRedisServer(settings)).count, "a")  # does not
"""

import time
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

S = TypeVar("S")
P = ParamSpec("P")
R = TypeVar("R")


def run_blocking(coroutine: Coroutine[Any, Any, R]) -> R:
    """Run a coroutine that never suspends.

    Args:
        coroutine: It awaits only blocking I/O.

    Returns:
        What it returns.

    Raises:
        RuntimeError: It suspends: its I/O is that of asyncio, and it must be awaited.
    """
    try:
        coroutine.send(None)
    except StopIteration as ended:
        return ended.value  # type: ignore[no-any-return]  # StopIteration is not generic
    coroutine.close()
    message = f"{coroutine} waits in an event loop: await it, see resilience.blocking.awaited."
    raise RuntimeError(message)


def blocking(
    rule: Callable[Concatenate[S, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[S, P], R]:
    """Make a method that is a coroutine a blocking one. `awaited` calls the coroutine itself."""

    @wraps(rule)
    def call(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return run_blocking(rule(self, *args, **kwargs))

    call.coroutine = rule  # type: ignore[attr-defined]
    return call


async def awaited(method: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Await a method that `blocking` has made; call any other one, such as a double of a test."""
    rule = getattr(method, "coroutine", None)
    if rule is None:
        return method(*args, **kwargs)
    return await rule(method.__self__, *args, **kwargs)  # type: ignore[attr-defined,no-any-return]


async def block(seconds: float) -> None:
    """Sleep in the calling thread: what `asyncio.sleep` is to an event loop."""
    time.sleep(seconds)  # noqa: ASYNC251  # that is its purpose
