"""The outbox in Redis: each step is one script of `outbox_scripts`, and so atomic."""

from collections.abc import Mapping
from typing import Any

from gradcam_worker.ledger import outbox
from gradcam_worker.ledger.outbox import (
    DESTINATION_BACKOFF,
    DeadDelivery,
    Delivery,
    Outbox,
)
from gradcam_worker.ledger.redis import outbox_scripts
from gradcam_worker.redis_server.client import RedisServer
from gradcam_worker.text.log_events import EventLogger

log = EventLogger("gradcam")

SINKS_TTL_MS = 86_400_000  # a sink must be opened at least this often: else its process is gone for good
MAX_PARKED_LISTED = 10_000
PARK_BATCH = 1000  # recipients: a few milliseconds of the server's time


class RedisOutbox(Outbox):
    """The outbox of the ledger on one server."""

    def __init__(self, server: RedisServer, *, retention_s: float) -> None:
        """Use a server.

        Args:
            server: The ledger's server.
            retention_s: How long parked deliveries are kept.
        """
        self._server = server
        self._retention_ms = int(retention_s * 1000)

    def open_sink(self, name: str) -> None:
        """See `Outbox.open_sink`."""
        with self._server.translate_errors():
            self._server.redis.sadd(self._key("sinks"), name)
            self._server.redis.pexpire(self._key("sinks"), SINKS_TTL_MS)

    def close_sink(self, name: str) -> None:
        """See `Outbox.close_sink`."""
        with self._server.translate_errors():
            self._server.redis.srem(self._key("sinks"), name)

    def claim_deliveries(
        self, limit: int, *, lease_s: float, limits: Mapping[str, int], others_limit: int
    ) -> list[Delivery]:
        """See `Outbox.claim_deliveries`. What only another version can read is left for that version."""
        claim = outbox_scripts.ClaimDeliveries(
            limit=limit,
            others_limit=others_limit,
            lease_ms=int(lease_s * 1000),
            retention_ms=self._retention_ms,
            destinations=[outbox_scripts.DestinationLimit(*item) for item in limits.items()],
        )
        deliveries = []
        for destination, recipient, text, tried, now, token, tenant in self._server.run(claim):
            tries, since = map(int, tried.split())
            waited_s = (int(now) - since) / 1000
            try:
                deliveries.append(
                    outbox.parse_delivery(
                        destination,
                        recipient,
                        text,
                        tries=tries,
                        waited_s=waited_s,
                        lease_token=token,
                        of_tenant=bool(tenant),
                    )
                )
            except ValueError as error:
                log.warning("outbox_delivery_unreadable", recipient=recipient, error=error)
        return deliveries

    def complete(self, delivery: Delivery) -> None:
        """See `Outbox.complete`."""
        self._server.run(
            outbox_scripts.CompleteDelivery(
                destination=delivery.destination,
                recipient=delivery.recipient,
                lease_token=delivery.lease_token,
            )
        )

    def postpone(self, delivery: Delivery, delay_s: float, *, quiet_s: float = 0) -> None:
        """See `Outbox.postpone`."""
        self._server.run(
            outbox_scripts.PostponeDelivery(
                destination=delivery.destination,
                recipient=delivery.recipient,
                lease_token=delivery.lease_token,
                delay_ms=int(delay_s * 1000),
                first_pause_ms=int(DESTINATION_BACKOFF.first_s * 1000),
                longest_pause_ms=int(DESTINATION_BACKOFF.max_s * 1000),
                url=delivery.webhook.url if delivery.webhook else "",
                quiet_ms=int(quiet_s * 1000) if delivery.webhook else 0,
            )
        )

    def park(self, delivery: Delivery) -> None:
        """See `Outbox.park`."""
        self._server.run(
            outbox_scripts.ParkDelivery(
                destination=delivery.destination,
                recipient=delivery.recipient,
                lease_token=delivery.lease_token,
                retention_ms=self._retention_ms,
            )
        )

    def park_overdue(self, destination: str, waited_s: float) -> int:
        """See `Outbox.park_overdue`."""
        return self._server.run(
            outbox_scripts.ParkOverdue(
                destination=destination,
                waited_ms=int(waited_s * 1000),
                retention_ms=self._retention_ms,
                limit=PARK_BATCH,
            )
        )

    def find_parked(self) -> list[DeadDelivery]:
        """See `Outbox.find_parked`: at most MAX_PARKED_LISTED."""
        with self._server.translate_errors():
            key = self._key("parked")
            members: Any = self._server.redis.zrange(
                key, 0, MAX_PARKED_LISTED - 1, desc=True, withscores=True
            )
            with self._server.redis.pipeline(transaction=False) as pipeline:
                for member, _ in members:
                    events = self._key(f"events:{str(member).partition(' ')[0]}")
                    pipeline.llen(events)
                    pipeline.lindex(events, 0)
                replies = pipeline.execute()
        parked = []
        for (member, score), events, text in zip(members, replies[::2], replies[1::2], strict=True):
            recipient, _, destination = str(member).partition(" ")
            try:
                first = outbox.parse_delivery(destination, recipient, text) if text else None
            except ValueError:
                first = None
            parked.append(DeadDelivery(destination, recipient, score / 1000, events, first))
        return parked

    def unpark(self, parked: DeadDelivery) -> bool:
        """See `Outbox.unpark`."""
        return bool(
            self._server.run(
                outbox_scripts.Unpark(destination=parked.destination, recipient=parked.recipient)
            )
        )

    def disable(self, url: str) -> None:
        """See `Outbox.disable`: for the retention of parked deliveries."""
        self._server.run(outbox_scripts.DisableUrl(url=url, disabled_ms=self._retention_ms))

    def find_disabled(self) -> list[str]:
        """See `Outbox.find_disabled`."""
        with self._server.translate_errors():
            urls: Any = self._server.redis.zrange(self._key("gone"), 0, -1)
        return [str(url) for url in urls]

    def enable(self, url: str) -> None:
        """See `Outbox.enable`."""
        with self._server.translate_errors():
            for name in ("gone", "later"):
                self._server.redis.zrem(self._key(name), url)

    def count_recipients(self) -> int:
        """See `Outbox.count_recipients`."""
        with self._server.translate_errors():
            return int(self._server.redis.hlen(self._key("waiting")))

    def _key(self, name: str) -> str:
        return self._server.prefix + name
