"""How many requests a tenant makes, and how many jobs it submits on a day: one script, one round trip.

    rate:<tenant>            when all its requests so far would have come at the allowed rate, in µs
    quota:<tenant>:<day>     the jobs that it has submitted on a day, counted from 1970
    repeats:<tenant>:<day>   a set: digests of the idempotency keys of these jobs

The clock is the server's, so all gateways share the limits. A day is one of UTC.
"""

import hashlib
from dataclasses import dataclass

from gradcam_worker.errors import QuotaExceeded, RateLimited
from gradcam_worker.gateway.access.tenants import TenantPolicy
from gradcam_worker.redis_server.script import LuaScript

MICROSECONDS = 1_000_000


@dataclass(kw_only=True)
class Admit(LuaScript[tuple[int, int]], file="admit"):
    """Count requests and jobs.

    Returns when the rate allows such requests, and when the quota allows jobs again, in ms from now. If
    either is not 0, nothing was counted.
    """

    tenant: str
    requests: int
    interval_us: int
    burst: int
    jobs: int
    jobs_per_day: int
    repeat_of: str


def make_admission(
    policy: TenantPolicy, *, requests: int = 0, jobs: int = 0, idempotency_key: str | None = None
) -> Admit:
    """Make the call that counts requests and jobs.

    Args:
        policy: The tenant's policy.
        requests: The number of requests.
        jobs: The number of jobs that they submit.
        idempotency_key: Of these jobs: submitted again on the same day, they cost nothing of the quota.

    Returns:
        The call.
    """
    digest = hashlib.sha256((idempotency_key or "").encode(errors="surrogatepass")).hexdigest()[:32]
    return Admit(
        tenant=policy.name,
        requests=requests,
        interval_us=max(round(MICROSECONDS / policy.rate), 1),
        burst=policy.burst,
        jobs=jobs,
        jobs_per_day=policy.jobs_per_day,
        repeat_of=digest if idempotency_key else "",
    )


def check_admission(policy: TenantPolicy, reply: tuple[int, int]) -> None:
    """Raise the error that the reply to an `Admit` means.

    Args:
        policy: The tenant's policy.
        reply: The reply.

    Raises:
        RateLimited: The tenant makes too many requests at a time.
        QuotaExceeded: It has submitted as many jobs as it may on this day.
    """
    rate_ms, quota_ms = reply
    if rate_ms:
        allowed = f"{policy.rate:g} per second, and {policy.burst} at once, are allowed"
        message = f"Too many requests of tenant {policy.name}: {allowed}."
        raise RateLimited(message, retry_after_s=rate_ms / 1000)
    if quota_ms:
        message = f"Tenant {policy.name} has submitted its {policy.jobs_per_day:,} jobs of this day (UTC)."
        raise QuotaExceeded(message, retry_after_s=quota_ms / 1000)
