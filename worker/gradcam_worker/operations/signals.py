"""What a signal does to a command that leaves something to be put away."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Make SIGTERM raise KeyboardInterrupt, as Ctrl-C does."""

    def interrupt(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_on_sigterm(number: int, _: FrameType | None) -> NoReturn:
    """A handler of SIGTERM: it leaves the `with` blocks, which stop what they have started."""
    sys.exit(128 + number)
