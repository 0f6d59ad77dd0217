"""gradcam_worker.schemas.ids."""

import os
import platform
import secrets
import time
import uuid
from datetime import UTC, datetime
from functools import cache


def utc_now() -> datetime:
    """The time now, aware, in UTC."""
    return datetime.now(UTC)


def new_id() -> str:
    """A UUIDv7 (RFC 9562, section 5.7): ids sort by the millisecond in which they were made."""
    value = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    value = value & ~(0xF << 76) | 7 << 76  # version 7
    return str(uuid.UUID(int=value & ~(3 << 62) | 2 << 62))  # variant of RFC 9562


def process_name() -> str:
    """What others call this process by: its host, what no other process has, and its number.

    Containers may have one host name, and each a process of the same number.
    """
    number = os.getpid()
    return f"{platform.node()}:{_drawn(number)}:{number}"


@cache
def _drawn(process: int) -> str:
    """By lot, once for each process: one that was forked draws its own."""
    del process
    return secrets.token_hex(4)
