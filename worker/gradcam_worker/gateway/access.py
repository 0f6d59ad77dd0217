"""Who calls, and what the caller may do."""

from dataclasses import dataclass
from typing import Literal

from gradcam_worker.schemas.job import Job
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.settings import Settings

Scope = Literal["read", "submit", "backfills", "operate"]


@dataclass(frozen=True)
class Caller:
    """Who makes a request."""

    uploads: str | None = None  # the URI below which the caller's images are stored

    def check_scope(self, scope: Scope) -> None:
        """Check that the caller's key has a scope."""
        del scope

    def check_job(self, job: Job) -> Job:
        """Check that the caller may submit a job; return it with what the caller's policy adds."""
        return job

    def check_image(self, uri: str) -> None:
        """Check that the caller may use an image."""
        del uri

    def visible(self, document: StatusDocument) -> StatusDocument:
        """The document as the caller may see it."""
        return document


class Access:
    """Tells callers apart by their keys."""

    def __init__(self, settings: Settings) -> None:
        """Whoever calls is the one user."""
        self._user = Caller(settings.uploads or None)

    async def authenticate(self, authorization: str | None) -> Caller:
        """Return who calls, by the request's header `Authorization`."""
        del authorization
        return self._user

    async def admit(self, caller: Caller, jobs: int = 0) -> None:
        """Count a request, and the jobs that it submits, against the caller's rate and quota."""
        del caller, jobs
