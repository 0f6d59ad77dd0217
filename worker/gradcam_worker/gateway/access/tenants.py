"""Tenants of the HTTP API: what each may read, where it may write, and how much it may ask for.

They are stored in the ledger's Redis as a hash, `tenants`: name -> policy as JSON. A gateway only reads it.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, StringConstraints, ValidationError

from gradcam_worker.errors import InvalidPolicy, UnknownTenant
from gradcam_worker.gateway.access.uri_prefixes import DEFAULT_PORTS, EVERYTHING, INLINE, UriPrefix, is_below
from gradcam_worker.ledger.ledger import MAX_SHARE, MIN_SHARE, TENANT_PATTERN, Tenant
from gradcam_worker.net import allowlist
from gradcam_worker.redis_server.client import RedisServer
from gradcam_worker.resilience.blocking import blocking, run_blocking
from gradcam_worker.schemas.job import Priority
from gradcam_worker.schemas.model import RequestModel, describe
from gradcam_worker.schemas.options import Name
from gradcam_worker.settings import STORAGE_URI_FORM, is_storage_uri
from gradcam_worker.text.similar_names import nearest
from gradcam_worker.text.urls import without_secrets

Scope = Literal["read", "submit", "backfills", "operate"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
DEFAULT_SCOPES: tuple[Scope, ...] = ("read", "submit")
# A tenant that may submit with the priority `high` is always served before those that may not.
DEFAULT_PRIORITIES: tuple[Priority, ...] = ("normal", "low", "bulk")


def _check_prefixes(texts: tuple[str, ...]) -> tuple[str, ...]:
    for text in texts:
        UriPrefix.parse(text)
    return texts


def _check_store(text: str) -> str:
    text = text.rstrip("/")
    if text and not is_storage_uri(text):
        message = f"{without_secrets(text)!r} {STORAGE_URI_FORM}"
        raise ValueError(message)
    if text:
        UriPrefix.parse(text)
    return text


Prefixes = Annotated[tuple[str, ...], AfterValidator(_check_prefixes)]
StorePrefix = Annotated[str, AfterValidator(_check_store)]


class TenantPolicy(RequestModel):
    """What a tenant may do. An unknown field is refused: a gateway must not ignore a limit that it lacks."""

    name: Annotated[str, StringConstraints(pattern=f"^{TENANT_PATTERN}$")]
    """its name"""
    share: Annotated[float, Field(ge=MIN_SHARE, le=MAX_SHARE)] = 1.0
    """its part of the workers where several tenants wait"""
    inputs: Prefixes = ()
    """where its images may come from, besides its uploads: see `uri_prefixes`"""
    output: Annotated[StorePrefix, StringConstraints(min_length=1)]
    """where its artifacts are stored: its own, and below what the workers allow"""
    uploads: StorePrefix = ""
    """where its uploaded images are stored: its own; empty: it may upload none"""
    webhook_hosts: Annotated[tuple[str, ...], AfterValidator(allowlist.normalize)] = ()
    """receivers that its jobs may name, written as in `GRADCAM_WEBHOOK_HOSTS`"""
    webhook_secrets: tuple[Name, ...] = ()
    """names of secrets that its webhooks may be signed with"""
    priorities: tuple[Priority, ...] = DEFAULT_PRIORITIES
    """priorities that its jobs may have"""
    scopes: tuple[Scope, ...] = DEFAULT_SCOPES
    """the most that its keys may do"""
    rate: Annotated[float, Field(gt=0, le=100_000)] = 50.0
    """requests per second, over time"""
    burst: Annotated[int, Field(ge=1, le=100_000)] = 100
    """requests at once"""
    jobs_per_day: Annotated[int, Field(ge=0)] = 0
    """jobs that it may submit on one day (UTC); 0: as many as it likes"""
    streams: Annotated[int, Field(ge=1, le=100_000)] = 50
    """requests of one gateway process that wait or stream events, at a time"""

    @classmethod
    def make(cls, **fields: Any) -> "TenantPolicy":
        """Make a policy from what an operator has given.

        Args:
            **fields: Its fields.

        Returns:
            The policy.

        Raises:
            InvalidPolicy: A field is invalid; the message names it.
        """
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            message = f"This is no policy of a tenant: {describe(error)}."
            raise InvalidPolicy(message) from error

    @property
    def tenant(self) -> Tenant:
        """The tenant as the ledger knows it."""
        return Tenant(self.name, self.share)

    @property
    def own_places(self) -> tuple[str, ...]:
        """The prefixes that no other tenant may read or write."""
        return tuple(filter(None, (self.output, self.uploads)))

    def allows_image(self, uri: str) -> bool:
        """Return whether a job may have the image at a URI."""
        return is_below(uri, (*self.inputs, *filter(None, [self.uploads])))

    def allows_list(self, uri: str) -> bool:
        """Return whether a backfill may read a list or a folder: one of the inputs, or below it."""
        uri = uri.rstrip("/")
        return uri in {prefix.rstrip("/") for prefix in self.inputs} or self.allows_image(uri)

    def allows_row(self, uri: str) -> bool:
        """Return whether a row of a backfill may have the image at a URI.

        Not an address of the web: the workers follow redirects of these, also to where the tenant may not go.
        """
        return self.allows_image(uri) and uri.partition(":")[0].lower() not in DEFAULT_PORTS

    def allows_output(self, uri: str) -> bool:
        """Return whether artifacts may be stored at a URI."""
        uri = uri.rstrip("/")
        return uri == self.output or is_below(uri, [self.output])


class Tenants:
    """The tenants in the ledger's Redis. `find` can be awaited: see `gradcam_worker.resilience.blocking`."""

    def __init__(self, server: RedisServer) -> None:
        """`server`: the ledger's."""
        self._server = server
        self._key = f"{server.prefix}tenants"

    @blocking
    async def find(self, name: str) -> TenantPolicy | None:
        """Find a tenant.

        Args:
            name: Its name.

        Returns:
            Its policy; None if there is none.

        Raises:
            InvalidPolicy: This version cannot read it.
            LedgerUnavailable: The ledger cannot be reached.
        """
        (text,) = await self._server.ask_each([("HGET", self._key, name)])
        return None if text is None else _read(name, str(text))

    def get(self, name: str) -> TenantPolicy:
        """Find a tenant that exists.

        Args:
            name: Its name.

        Returns:
            Its policy.

        Raises:
            UnknownTenant: There is none of this name.
            InvalidPolicy: This version cannot read it.
            LedgerUnavailable: The ledger cannot be reached.
        """
        policy = self.find(name)
        if policy is None:
            similar = nearest(name, [one.name for one in self.find_all()], limit=1)
            hint = f" Did you mean {similar[0]}?" if similar else ""
            message = f"There is no tenant {name!r}: `gradcam tenants set {name}` makes it.{hint}"
            raise UnknownTenant(message)
        return policy

    def find_all(self) -> list[TenantPolicy]:
        """Find all tenants.

        Returns:
            Their policies, by name.

        Raises:
            InvalidPolicy: This version cannot read one of them.
            LedgerUnavailable: The ledger cannot be reached.
        """
        (texts,) = run_blocking(self._server.ask_each([("HGETALL", self._key)]))
        return [_read(name, text) for name, text in sorted(texts.items())]

    def store(self, policy: TenantPolicy) -> None:
        """Make a tenant, or replace its policy. Gateways see it within `access.CACHE_S` seconds.

        Args:
            policy: The policy.

        Raises:
            InvalidPolicy: It would read or write another tenant's uploads or results, or let another read or
                write its own.
            LedgerUnavailable: The ledger cannot be reached.
        """
        for other in self.find_all():
            if other.name != policy.name:
                _check_apart(policy, other)
                _check_apart(other, policy)
        run_blocking(self._server.ask_each([("HSET", self._key, policy.name, policy.to_json())]))

    def remove(self, name: str) -> bool:
        """Remove a tenant. Its keys must be revoked before: a later tenant of this name would inherit them.

        Args:
            name: Its name.

        Returns:
            Whether there was one.

        Raises:
            LedgerUnavailable: The ledger cannot be reached.
        """
        (removed,) = run_blocking(self._server.ask_each([("HDEL", self._key, name)]))
        return bool(removed)


def _read(name: str, text: str) -> TenantPolicy:
    try:
        return TenantPolicy.model_validate_json(text)
    except ValidationError as error:
        message = (
            f"The policy of tenant {name!r} cannot be read by this version: {describe(error)}. "
            "`gradcam tenants set` of this version writes it anew."
        )
        raise InvalidPolicy(message) from error


def _check_apart(one: TenantPolicy, other: TenantPolicy) -> None:
    """Raise InvalidPolicy if one tenant's images or places lie within the other's places, or around them."""
    reaching = [uri for uri in (*one.inputs, *one.own_places) if uri != INLINE]
    for uri in reaching:
        for place in other.own_places:
            if UriPrefix.parse(uri).overlaps(UriPrefix.parse(place)):
                hint = ": list its inputs one by one" if uri == EVERYTHING else ""
                message = (
                    f"Tenant {one.name!r} would reach {place!r}, which is tenant {other.name!r}'s own, "
                    f"by {uri!r}{hint}."
                )
                raise InvalidPolicy(message)
