"""Keeps queue items that are no messages and have no id, for an operator: no sender can be answered."""

import hashlib
import json

import redis
from kombu.exceptions import KombuError

from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

KEY = "unreadable"  # a list in Redis; `unreadable:count` counts all items that there ever were
MAX_ITEMS = 100
MAX_BYTES = 200  # of each item: enough to recognise it
TTL_MS = 7 * 86_400_000  # after the last item


def set_aside(pool: redis.ConnectionPool, key_prefix: str, item: bytes, source: str, reason: str) -> None:
    """Log an item, and keep its beginning in Redis. Never raises.

    Args:
        pool: Connections to the broker.
        key_prefix: The prefix of all keys.
        item: The item as it was received.
        source: The queue or key that it was in.
        reason: Why it is no message, as part of a sentence.
    """
    sha256 = hashlib.sha256(item).hexdigest()  # the log must not repeat the content
    log.error("queue_item_unreadable", queue=source, reason=reason, bytes=len(item), sha256=sha256)
    record = {
        "at": utc_now().isoformat(),
        "queue": source,
        "why": reason,
        "bytes": len(item),
        "sha256": sha256,
        "begins": item[:MAX_BYTES].decode(errors="backslashreplace"),
    }
    key = f"{key_prefix}{KEY}"
    try:
        # Not kombu's client, which adds its prefix to the keys of some commands only.
        with redis.Redis(connection_pool=pool).pipeline() as pipe:
            pipe.lpush(key, json.dumps(record))
            pipe.ltrim(key, 0, MAX_ITEMS - 1)
            pipe.pexpire(key, TTL_MS)
            pipe.incr(f"{key}:count")
            pipe.execute()
    except (redis.exceptions.RedisError, KombuError, OSError) as error:
        log.error("queue_item_not_kept", key=key, error=error)  # noqa: TRY400  # the cause is named
