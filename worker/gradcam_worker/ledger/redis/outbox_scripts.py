"""The calls of the outbox's scripts: each class is one file of `lua/`. What they do is said there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gradcam_worker.ledger.redis.script import LuaScript


class DestinationLimit(NamedTuple):
    """How many deliveries to a destination may be claimed."""

    destination: str
    limit: int


@dataclass(frozen=True, kw_only=True)
class ClaimDeliveries(LuaScript[list[list[str]]], file="claim_deliveries"):
    """Claim what is due. Returns of each: destination, recipient, event, tries and since, now, token."""

    limit: int
    others_limit: int
    lease_ms: int
    retention_ms: int
    destinations: Sequence[DestinationLimit]


@dataclass(frozen=True, kw_only=True)
class CompleteDelivery(LuaScript[int], file="complete_delivery"):
    """Remove a recipient's first event. Returns 0 where another dispatcher has claimed it by now."""

    destination: str
    recipient: str
    lease_token: str


@dataclass(frozen=True, kw_only=True)
class PostponeDelivery(LuaScript[int], file="postpone_delivery"):
    """Try a delivery again later. Returns 0 where another dispatcher has claimed it by now."""

    destination: str
    recipient: str
    lease_token: str
    delay_ms: int
    first_pause_ms: int
    longest_pause_ms: int
    url: str
    quiet_ms: int


@dataclass(frozen=True, kw_only=True)
class ParkDelivery(LuaScript[int], file="park_delivery"):
    """Give a recipient up. Returns 0 where another dispatcher has claimed it by now."""

    destination: str
    recipient: str
    lease_token: str
    retention_ms: int


@dataclass(frozen=True, kw_only=True)
class ParkOverdue(LuaScript[int], file="park_overdue"):
    """Give up the recipients of a destination that have waited too long. Returns how many."""

    destination: str
    waited_ms: int
    retention_ms: int
    limit: int


@dataclass(frozen=True, kw_only=True)
class Unpark(LuaScript[int], file="unpark"):
    """Try a parked recipient again. Returns 0 where there is nothing to try."""

    destination: str
    recipient: str


@dataclass(frozen=True, kw_only=True)
class DisableUrl(LuaScript[int], file="disable_url"):
    """Deliver nothing to a URL any more."""

    url: str
    disabled_ms: int
