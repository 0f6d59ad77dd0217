"""The outbox in Redis, beside the ledger: each step one script of `redis_scripts`."""

from typing import Any

from worker import outbox, redis_scripts
from worker.outbox import Outbox, Parcel, Parked
from worker.redis_ledger import Server

LISTED = 10_000  # parked recipients
PAUSE_OF_A_LANE_S, LONGEST_PAUSE_OF_A_LANE_S = 2.0, 60.0  # after a failure there; doubles


class RedisOutbox(Outbox):
    """The outbox of the ledger on this server."""

    def __init__(self, server: Server, *, retention_s: float) -> None:
        """`retention_s` is how long what is parked can be replayed."""
        self._server = server
        self._retention_ms = int(retention_s * 1000)

    def open_sink(self, name: str) -> None:
        """See `Outbox.open_sink`."""
        with self._server.reaching():
            self._server.redis.sadd(self._key("sinks"), name)

    def close_sink(self, name: str) -> None:
        """See `Outbox.close_sink`."""
        with self._server.reaching():
            self._server.redis.srem(self._key("sinks"), name)

    def take(self, limit: int, keep_s: float) -> list[Parcel]:
        """See `Outbox.take`."""
        parcels = []
        found = self._server.run(redis_scripts.TAKE, limit, max(limit // 2, 1), int(keep_s * 1000))
        for lane, recipient, text, tried, now in found:
            tries, first = tried.split()
            waited_s = (int(now) - int(first)) / 1000
            parcels.append(outbox.read(lane, recipient, text, int(tries), waited_s))
        return parcels

    def delivered(self, parcel: Parcel) -> None:
        """See `Outbox.delivered`."""
        self._server.run(redis_scripts.DELIVERED, parcel.lane, parcel.recipient, parcel.text)

    def postpone(self, parcel: Parcel, delay_s: float) -> None:
        """See `Outbox.postpone`."""
        tries = parcel.tries + 1
        self._server.run(
            redis_scripts.POSTPONE,
            parcel.lane,
            parcel.recipient,
            int(delay_s * 1000),
            tries,
            int(PAUSE_OF_A_LANE_S * 1000),
            int(LONGEST_PAUSE_OF_A_LANE_S * 1000),
        )

    def park(self, parcel: Parcel) -> None:
        """See `Outbox.park`."""
        self._server.run(redis_scripts.PARK, parcel.lane, parcel.recipient, self._retention_ms)

    def parked(self) -> list[Parked]:
        """See `Outbox.parked`."""
        with self._server.reaching():
            key = self._key("parked")
            found: Any = self._server.redis.zrange(key, 0, LISTED - 1, desc=True, withscores=True)
            with self._server.redis.pipeline(transaction=False) as pipeline:
                for member, _ in found:
                    pipeline.lindex(self._key(f"events:{str(member).partition(' ')[0]}"), 0)
                texts = pipeline.execute()
        parked = []
        for (member, score), text in zip(found, texts, strict=True):
            recipient, _, lane = str(member).partition(" ")
            first = outbox.read(lane, recipient, text) if text else None
            parked.append(Parked(lane, recipient, score / 1000, first))
        return parked

    def unpark(self, one: Parked) -> bool:
        """See `Outbox.unpark`."""
        return bool(self._server.run(redis_scripts.UNPARK, one.lane, one.recipient))

    def disable(self, url: str) -> None:
        """See `Outbox.disable`: as long as anything is remembered."""
        self._server.run(redis_scripts.DISABLE, url, self._retention_ms)

    def disabled(self, url: str) -> bool:
        """See `Outbox.disabled`."""
        with self._server.reaching():
            return self._server.redis.zscore(self._key("gone"), url) is not None

    def enable(self, url: str) -> None:
        """See `Outbox.enable`."""
        with self._server.reaching():
            self._server.redis.zrem(self._key("gone"), url)

    def count(self) -> int:
        """See `Outbox.count`."""
        with self._server.reaching():
            return int(self._server.redis.zcard(self._key("outbox")))

    def _key(self, name: str) -> str:
        return self._server.prefix + name
