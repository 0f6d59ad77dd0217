"""Whose turn it is among the tenants that wait in one route: start-time fair queueing, as in Redis."""

from collections.abc import Callable

HEAD_START = 32  # turns of a tenant that has waited for none lately: a pass or two, not a backlog
PASSED_OVER = 1e13  # subtracted from the place of a job whose message was used for another


class Turns:
    """The turns of one route.

    Each tenant has a virtual time, and the one whose is smallest is next. A claim of one of its jobs adds the
    claim's cost to it, so tenants get turns in relation to the inverse of their costs. (Goyal, Vin and Cheng,
    "Start-time Fair Queueing", 1996: the start tag of each flow.) The present is the largest virtual time of
    which a job was claimed. A tenant that comes begins `HEAD_START` of its turns before the present, where
    theirs begin at it, so that a few jobs do not wait for a half of the workers; what it has had lately
    counts, so over a long time its turns are the same.
    """

    def __init__(self) -> None:
        """No tenant waits."""
        self.waiting: dict[str, dict[str, float]] = {}  # tenant -> job id -> place
        self.times: dict[str, float] = {}  # of the tenants that have jobs
        self.rested: dict[str, float] = {}  # of those that had turns and have no jobs, while others have
        self.present = 0.0

    def join(self, tenant: str, job_id: str, queued_at: float, cost: float = 1) -> None:
        """Let a queued job wait for its tenant's turn. Nobody's jobs wait only where a tenant does.

        Args:
            tenant: The name of its tenant.
            job_id: The id of the job.
            queued_at: Its place among its tenant's.
            cost: Of a claim of one of its tenant's jobs.
        """
        if not tenant and not self.times:
            return
        self.waiting.setdefault(tenant, {})[job_id] = queued_at
        if tenant not in self.times:
            start = self.present - HEAD_START * cost
            self.times[tenant] = max(start, self.rested.pop(tenant, start))

    def leave(self, tenant: str, job_id: str, cost: float = 0) -> None:
        """Remove a job that is not queued any more.

        Args:
            tenant: The name of its tenant.
            job_id: The id of the job.
            cost: By which the tenant's next turn is later: not 0 for a claim.
        """
        jobs = self.waiting.get(tenant, {})
        jobs.pop(job_id, None)
        if tenant not in self.times:
            return
        if cost:
            self.present = max(self.present, self.times[tenant])
        self.times[tenant] += cost
        if jobs:
            return
        time = self.times.pop(tenant)
        self.waiting.pop(tenant, None)
        self.rested[tenant] = time
        if not self.times:
            self.rested, self.present = {}, 0.0

    def choose(
        self, is_queued: Callable[[str], bool], own: tuple[str, str, float, float] | None = None
    ) -> str | None:
        """Choose the job to claim.

        Args:
            is_queued: Whether a job is still queued.
            own: Tenant, id, place and cost of the message's own job; None if that is not queued.

        Returns:
            The id of the job; None if there is none.
        """
        own_tenant, own_id, place, cost = own or (None, None, 0.0, 1.0)
        if not self.times:
            return own_id
        if own_tenant is not None and own_id is not None and own_id not in self.waiting.get(own_tenant, {}):
            self.join(own_tenant, own_id, place, cost)
        while self.times:
            _, tenant = min((time, name) for name, time in self.times.items())
            place, first = min((place, job_id) for job_id, place in self.waiting[tenant].items())
            if tenant == own_tenant and place >= 0:
                return own_id
            if is_queued(first):
                return first
            self.leave(tenant, first)
        return own_id

    def is_passed_over(self, tenant: str, job_id: str) -> bool:
        """Whether the message of a queued job was used for another."""
        return self.waiting.get(tenant, {}).get(job_id, 0) < 0

    def pass_over(self, tenant: str, job_id: str) -> None:
        """The message of a queued job is used for another: its tenant's next turn is for this job."""
        place = self.waiting[tenant][job_id]
        self.waiting[tenant][job_id] = place - PASSED_OVER if place >= 0 else place
