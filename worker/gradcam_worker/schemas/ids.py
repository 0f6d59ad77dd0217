"""Ids of jobs and of processes, and the current time."""

import os
import platform
import secrets
import time
import uuid
from datetime import UTC, datetime
from functools import cache


def utc_now() -> datetime:
    """Get the current time, with the time zone UTC."""
    return datetime.now(UTC)


def new_id() -> str:
    """Create a UUIDv7 (RFC 9562, section 5.7): ids sort by the millisecond of their creation."""
    value = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    value = value & ~(0xF << 76) | 7 << 76  # version 7
    return str(uuid.UUID(int=value & ~(3 << 62) | 2 << 62))  # variant of RFC 9562


def process_name() -> str:
    """Get the unique name of this process: host name, a random part and the process id.

    The random part is needed because containers may have equal host names and process ids.
    """
    process_id = os.getpid()
    return f"{platform.node()}:{_random_part(process_id)}:{process_id}"


@cache
def _random_part(process_id: int) -> str:
    """Eight random hexadecimal digits; a forked process gets its own."""
    del process_id  # the key of the cache
    return secrets.token_hex(4)
