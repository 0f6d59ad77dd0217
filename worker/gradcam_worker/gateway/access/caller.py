"""Who calls the HTTP API, and what they may do.

A request carries an API key, as `Authorization: Bearer gck_...`. Where no key was ever made, and the gateway
listens on this machine alone, it serves the one user of this machine, who needs none and sees everything.
Then the headers `Host` and `Origin` are checked: a page of a stranger, open in the user's browser, could
otherwise submit forms to this machine, or reach it by a name of its own (DNS rebinding).
"""

import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from gradcam_worker.errors import (
    GradcamError,
    InvalidApiKey,
    InvalidJob,
    OutputNotAllowed,
    RateLimited,
    ScopeMissing,
    UriNotAllowed,
)
from gradcam_worker.gateway.access import api_keys, limits
from gradcam_worker.gateway.access.api_keys import MARK, ApiKey, ApiKeys
from gradcam_worker.gateway.access.tenants import SCOPES, Scope, TenantPolicy, Tenants
from gradcam_worker.gateway.access.uri_prefixes import DEFAULT_PORTS, INLINE, UriPrefix
from gradcam_worker.ledger.ledger import Tenant
from gradcam_worker.redis_server.async_client import AsyncRedisServer
from gradcam_worker.redis_server.client import RedisServer
from gradcam_worker.resilience.blocking import awaited
from gradcam_worker.resilience.outages import Outage
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.schemas.job import Job, Webhook
from gradcam_worker.schemas.status import StatusDocument
from gradcam_worker.settings import Settings
from gradcam_worker.text.urls import without_secrets

CACHE_S = 5.0  # a key that is revoked, or a policy that is changed, has its effect within this time
TIMEOUT_S, RETRIES = 2.0, 1  # for one answer of Redis: a request waits for it
MAX_SHOWN = 200  # characters of a received value in a message
BEARER = "Bearer"
HOW = "send the header `Authorization: Bearer gck_...`, with a key that `gradcam keys create` has made"
WRONG_KEY = "The API key is not valid. Its form is gck_, 12 characters, _ and 46 characters."
NO_KEY = ApiKey.make("nobody")[1]  # the record of no key: an unknown prefix takes as long as a wrong secret


@dataclass(frozen=True)
class Caller:
    """Who makes a request, and what they may do.

    Attributes:
        policy: What the tenant may do; None: the one user of this machine, who may do everything.
        scopes: The kinds of requests that are allowed.
        key: The beginning of the key, which can be shown; empty without a key.
        uploads: The prefix below which uploads are stored; None: they are not allowed.
    """

    policy: TenantPolicy | None
    scopes: frozenset[Scope]
    key: str
    uploads: str | None

    @property
    def tenant(self) -> Tenant | None:
        """For whom jobs are submitted; None: for nobody."""
        return self.policy.tenant if self.policy else None

    @property
    def tenant_name(self) -> str | None:
        """Whose jobs are read and changed; None: everybody's."""
        return self.policy.name if self.policy else None

    def check_scope(self, scope: Scope) -> None:
        """Raise ScopeMissing if the key is not for requests of this kind."""
        if scope not in self.scopes:
            has = ", ".join(sorted(self.scopes)) or "none"
            message = f"Key {self.key} lacks the scope {scope}: it has {has}."
            missing = ScopeMissing(message)
            detail = f"this needs the scope {scope}; the key has {has}"
            missing.findings = ({"header": "Authorization", "detail": detail},)
            raise missing

    def check_job(self, job: Job) -> Job:
        """Check that a job stays within what the tenant may do.

        What errors say is of the tenant's own policy alone, and in their `findings`, for the caller.

        Args:
            job: As it was received.

        Returns:
            The job to submit: with the tenant's output if it names none, and without redirects of web
            addresses, which could lead where the tenant may not go.

        Raises:
            UriNotAllowed: The image or a webhook is elsewhere.
            OutputNotAllowed: The output is elsewhere.
            InvalidJob: It has an id, a priority or a webhook secret that the tenant may not choose.
        """
        policy = self.policy
        if policy is None:
            return job
        if "id" in job.model_fields_set:
            message = "id is not for you to choose: use an idempotency key, which is your own"
            raise _refusal(InvalidJob, "id", message)
        if job.priority not in policy.priorities:
            allowed = ", ".join(policy.priorities) or "none"
            message = f"priority {job.priority!r} is not allowed: {allowed} would be"
            raise _refusal(InvalidJob, "priority", message)
        images = [job.image.uri]
        if job.annotations and job.annotations.mask and job.annotations.mask.uri:
            images.append(job.annotations.mask.uri)
        for uri in images:
            self.check_image(uri)
        for number, webhook in enumerate(job.webhooks):
            _check_webhook(policy, number, webhook)
        changes: dict[str, object] = {"output": job.output or policy.output}
        self.check_output(str(changes["output"]))
        if any(uri.partition(":")[0].lower() in DEFAULT_PORTS for uri in images):
            changes["image"] = job.image.model_copy(update={"redirects": False})
        return job.model_copy(update=changes)

    def check_image(self, uri: str) -> None:
        """Raise UriNotAllowed if the tenant may not have an image explained."""
        policy = self.policy
        if policy and not policy.allows_image(uri):
            places = " or ".join([*policy.inputs, *filter(None, [policy.uploads])]) or "nowhere"
            message = f"image {_shown(uri)} is not allowed: images may come from below {places}"
            raise _refusal(UriNotAllowed, "image", message)

    def check_list(self, uri: str, name: str = "input") -> None:
        """Raise UriNotAllowed if a backfill of the tenant may not read it; `name`: of the request's field."""
        if self.policy and not self.policy.allows_list(uri):
            places = " or ".join(self.policy.inputs) or "nowhere"
            message = f"{name} {_shown(uri)} is not allowed: it must be below {places}"
            raise _refusal(UriNotAllowed, name, message)

    def check_output(self, uri: str) -> None:
        """Raise OutputNotAllowed if the tenant may not store artifacts there."""
        if self.policy and not self.policy.allows_output(uri):
            message = f"output {_shown(uri)} is not allowed: it must be below {self.policy.output}"
            raise _refusal(OutputNotAllowed, "output", message)

    def visible(self, document: StatusDocument) -> StatusDocument:
        """Return the part of a document that the caller may see.

        Args:
            document: The document of one of the caller's jobs.

        Returns:
            For a tenant, `StatusDocument.for_tenant`.
        """
        return document.for_tenant() if self.policy else document


class Access:
    """Recognizes callers and counts their requests. One for each process."""

    def __init__(
        self,
        settings: Settings,
        server: RedisServer | None = None,
        *,
        loopback: bool = False,
        outage: Outage | None = None,
    ) -> None:
        """Connect to nothing yet.

        Args:
            settings: Those of the ledger's server; `uploads` are those of the one user, and pages of
                `serve_origins` may ask for that user.
            server: Stands in for the ledger's.
            loopback: Whether the gateway listens at an address of this machine alone.
            outage: Is told of calls of Redis that fail.
        """
        self._server = server or AsyncRedisServer(
            settings, timeout_s=TIMEOUT_S, retries=RETRIES, outage=outage
        )
        self._keys, self._tenants = ApiKeys(self._server), Tenants(self._server)
        self._loopback, self._origins = loopback, settings.serve_origins
        self._one_user = Caller(None, frozenset(SCOPES), "", settings.uploads or None)
        self._known: dict[str, tuple[ApiKey, TenantPolicy, float]] = {}  # by prefix, with the time of reading
        self._keyless_until = 0.0  # until when it is known that no key exists
        self._streams: Counter[str] = Counter()

    async def authenticate(
        self, authorization: str | None, *, host: str | None = None, origin: str | None = None
    ) -> Caller:
        """Find out who makes a request.

        Args:
            authorization: Its header of this name; None: it has none.
            host: Likewise.
            origin: Likewise.

        Returns:
            The caller.

        Raises:
            InvalidApiKey: There is no valid key in it, and one is needed.
            LedgerUnavailable: Redis cannot be reached.
        """
        if authorization is None:
            await self._check_keyless(host, origin)
            return self._one_user
        scheme, _, key = authorization.strip().partition(" ")
        prefix = api_keys.read_prefix(key.strip()) if scheme.lower() == BEARER.lower() else None
        if prefix is None:
            raise _no_access(WRONG_KEY)
        record, policy = await self._find(prefix)
        if not record.matches(key.strip()) or policy is None:
            raise _no_access(WRONG_KEY)
        shown = f"{MARK}_{prefix}"
        if problem := record.problem(utc_now()):  # told only to whoever has the whole key
            message = f"API key {shown} {problem}: use another one."
            raise _no_access(message)
        scopes = frozenset(record.scopes) & frozenset(policy.scopes)
        return Caller(policy, scopes, shown, policy.uploads or None)

    async def admit(self, caller: Caller) -> None:
        """Count a request. Raises RateLimited, LedgerUnavailable."""
        await self._count(caller, requests=1)

    async def admit_jobs(self, caller: Caller, jobs: int = 1, idempotency_key: str | None = None) -> None:
        """Count jobs before they are submitted or tried again, and after everything that could be refused.

        Args:
            caller: Who submits them.
            jobs: How many.
            idempotency_key: Theirs: the same request again costs nothing.

        Raises:
            QuotaExceeded: The tenant has submitted as many jobs as it may on this day.
            LedgerUnavailable: Redis cannot be reached.
        """
        if caller.policy and caller.policy.jobs_per_day:
            await self._count(caller, jobs=jobs, idempotency_key=idempotency_key)

    @asynccontextmanager
    async def stream(self, caller: Caller) -> AsyncIterator[None]:
        """Hold one of the tenant's streams of this process: a request that waits or streams events.

        Args:
            caller: Who makes the request.

        Raises:
            RateLimited: All of them are held.
        """
        policy = caller.policy
        if policy is None:
            yield
            return
        if self._streams[policy.name] >= policy.streams:
            message = f"Tenant {policy.name} has {policy.streams} requests open that wait or stream events."
            raise RateLimited(message)
        self._streams[policy.name] += 1
        try:
            yield
        finally:
            self._streams[policy.name] -= 1

    async def close(self) -> None:
        """Close the connections."""
        await awaited(self._server.close)

    async def _find(self, prefix: str) -> tuple[ApiKey, TenantPolicy | None]:
        """The record of a key and its tenant's policy; those of no key if there are none."""
        known = self._known.get(prefix)
        if known and time.monotonic() < known[2] + CACHE_S:
            return known[:2]
        read_at = time.monotonic()
        record = await awaited(self._keys.find, prefix)
        policy = await awaited(self._tenants.find, record.tenant) if record else None
        if record is None or policy is None:
            self._known.pop(prefix, None)
            return NO_KEY, None
        self._known[prefix] = (record, policy, read_at)
        return record, policy

    async def _check_keyless(self, host: str | None, origin: str | None) -> None:
        """Raise InvalidApiKey unless a request needs no key."""
        if not self._loopback:
            message = f"No API key was sent: {HOW}."
            raise _no_access(message)
        if time.monotonic() >= self._keyless_until:
            read_at = time.monotonic()
            if await awaited(self._keys.exist):
                message = f"No API key was sent: {HOW}."
                raise _no_access(message)
            self._keyless_until = read_at + CACHE_S
        if not is_this_machine(host):
            message = f"No API key was sent, and Host {host!r:.{MAX_SHOWN}} is not this machine: {HOW}."
            raise _no_access(message)
        own = origin is None or urlsplit(origin).netloc.lower() == str(host).lower()
        if not own and str(origin).lower() not in self._origins:
            message = f"No API key was sent, and a page of {origin!r:.{MAX_SHOWN}} asks: {HOW}."
            raise _no_access(message)

    async def _count(
        self, caller: Caller, *, requests: int = 0, jobs: int = 0, idempotency_key: str | None = None
    ) -> None:
        policy = caller.policy
        if policy is None:
            return
        call = limits.make_admission(policy, requests=requests, jobs=jobs, idempotency_key=idempotency_key)
        limits.check_admission(policy, await self._server.ask(call))


def is_this_machine(host: str | None) -> bool:
    """Return whether a host, as in the header `Host`, is this machine, by a name that no stranger can give.

    Args:
        host: `localhost:8000`, `127.0.0.1:8000`, `[::1]:8000`, with or without port; or `::1`.
    """
    name = (host or "").lower()
    if name.startswith("["):
        name = name[1:].partition("]")[0]
    elif name.count(":") < 2:  # noqa: PLR2004  # one is before a port, an IPv6 address has more
        name = name.partition(":")[0]
    if name == "localhost":
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


def _no_access(message: str) -> InvalidApiKey:
    """An error about the key of a request, which the caller is told in full."""
    error = InvalidApiKey(message)
    error.findings = ({"header": "Authorization", "detail": message},)
    return error


def _check_webhook(policy: TenantPolicy, number: int, webhook: Webhook) -> None:
    """Raise UriNotAllowed, InvalidJob if a tenant may not have events sent there, or signed so."""
    hosts = [f"{scheme}://{host}" for host in policy.webhook_hosts for scheme in DEFAULT_PORTS]
    if not any(UriPrefix.parse(host).contains(webhook.url) for host in hosts):
        allowed = ", ".join(policy.webhook_hosts) or "none"
        message = f"webhook {_shown(webhook.url)} is not allowed: the hosts are {allowed}"
        raise _refusal(UriNotAllowed, f"webhooks/{number}/url", message)
    if webhook.secret_ref is not None and webhook.secret_ref not in policy.webhook_secrets:
        allowed = ", ".join(policy.webhook_secrets) or "none"
        message = f"secret_ref {webhook.secret_ref[:60]!r} is not yours: {allowed} would be"
        raise _refusal(InvalidJob, f"webhooks/{number}/secret_ref", message)


def _refusal(error: type[GradcamError], field: str, message: str) -> GradcamError:
    """An error about a field of a job, which the caller is told in full."""
    refused = error(f"{message[0].upper()}{message[1:]}.")
    refused.findings = ({"pointer": f"#/{field}", "detail": message},)
    return refused


def _shown(uri: str) -> str:
    """A received URI for a message: without user, query and data, not too long."""
    return repr("data:..." if UriPrefix(INLINE).contains(uri) else without_secrets(uri)[:MAX_SHOWN])
