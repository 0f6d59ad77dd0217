import asyncio
from dataclasses import dataclass

import pytest

from gradcam_worker.resilience.blocking import awaited, blocking, run_blocking


@dataclass
class Counter:
    """A rule over a question that may wait in an event loop."""

    waits: bool
    asked: int = 0

    async def _ask(self) -> int:
        self.asked += 1
        if self.waits:
            await asyncio.sleep(0)
        return self.asked

    @blocking
    async def count(self, step: int = 1) -> int:
        """Count on."""
        return step * await self._ask()

    @blocking
    async def count_twice(self) -> int:
        return await awaited(self.count) + await awaited(self.count, step=10)


class Double(Counter):
    def count(self, step: int = 1) -> int:
        return -step


def test_a_rule_is_called_by_blocking_code_and_awaited_by_asyncio() -> None:
    assert Counter(waits=False).count_twice() == 1 + 20
    assert asyncio.run(awaited(Counter(waits=True).count_twice)) == 1 + 20
    assert Counter.count.__doc__ == "Count on."


def test_a_double_may_override_a_rule_with_a_plain_method() -> None:
    assert Double(waits=False).count_twice() == -11
    assert asyncio.run(awaited(Double(waits=True).count_twice)) == -11


def test_what_would_wait_in_an_event_loop_is_not_run_without_one() -> None:
    with pytest.raises(RuntimeError, match=r"Counter.count .* waits in an event loop: await it"):
        Counter(waits=True).count()


def test_an_error_of_a_rule_is_raised_as_it_is() -> None:
    async def wrong() -> None:
        raise KeyError(1)

    with pytest.raises(KeyError):
        run_blocking(wrong())
