"""Who calls, and what the caller may do."""

from dataclasses import dataclass
from typing import Literal

from gradcam_worker.schemas.job import Job

Scope = Literal["read", "submit", "backfills", "operate"]


@dataclass(frozen=True)
class Caller:
    """Who makes a request."""

    def check_scope(self, scope: Scope) -> None:
        """Check that the caller's key has a scope."""
        del scope

    def check_job(self, job: Job) -> Job:
        """Check that the caller may submit a job; return it with what the caller's policy adds."""
        return job


class Access:
    """Tells callers apart by their keys."""

    async def authenticate(self, authorization: str | None) -> Caller:
        """Return who calls, by the request's header `Authorization`."""
        del authorization
        return Caller()

    async def admit(self, caller: Caller, jobs: int = 0) -> None:
        """Count a request, and the jobs that it submits, against the caller's rate and quota."""
        del caller, jobs
