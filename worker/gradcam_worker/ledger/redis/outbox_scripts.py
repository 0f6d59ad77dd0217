"""The typed calls of the outbox's scripts. Each class is one file of `lua/`, which documents what it does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gradcam_worker.redis_server.script import LuaScript


class DestinationLimit(NamedTuple):
    """The maximum number of deliveries to claim for a destination."""

    destination: str
    limit: int


@dataclass(kw_only=True)
class ClaimDeliveries(LuaScript[list[list[str]]], file="claim_deliveries"):
    """Claim due deliveries.

    Returns for each: destination, recipient, event, "tries since", now, token, tenant.
    """

    limit: int
    others_limit: int
    lease_ms: int
    retention_ms: int
    destinations: Sequence[DestinationLimit]


@dataclass(kw_only=True)
class CompleteDelivery(LuaScript[int], file="complete_delivery"):
    """Remove a recipient's first event. Returns 0 if another dispatcher has claimed it."""

    destination: str
    recipient: str
    lease_token: str


@dataclass(kw_only=True)
class PostponeDelivery(LuaScript[int], file="postpone_delivery"):
    """Try a delivery again later. Returns 0 if another dispatcher has claimed it."""

    destination: str
    recipient: str
    lease_token: str
    delay_ms: int
    first_pause_ms: int
    longest_pause_ms: int
    url: str
    quiet_ms: int


@dataclass(kw_only=True)
class ParkDelivery(LuaScript[int], file="park_delivery"):
    """Park a claimed recipient. Returns 0 if another dispatcher has claimed it."""

    destination: str
    recipient: str
    lease_token: str
    retention_ms: int


@dataclass(kw_only=True)
class ParkOverdue(LuaScript[int], file="park_overdue"):
    """Park the recipients of a destination that have waited too long. Returns their number."""

    destination: str
    waited_ms: int
    retention_ms: int
    limit: int


@dataclass(kw_only=True)
class Unpark(LuaScript[int], file="unpark"):
    """Queue a parked recipient again. Returns 0 if there is nothing to deliver."""

    destination: str
    recipient: str


@dataclass(kw_only=True)
class DisableUrl(LuaScript[int], file="disable_url"):
    """Stop deliveries to a URL."""

    url: str
    disabled_ms: int
