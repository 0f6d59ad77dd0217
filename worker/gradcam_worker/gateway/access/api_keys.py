"""API keys: `gck_<prefix>_<secret>`, of which only a salted hash is stored.

They are stored in the ledger's Redis as a hash, `api_keys`: prefix -> record as JSON. The prefix is shown in
lists and logs. The secret is random, of 238 bits, and ends with a checksum by which programs that search for
leaked keys tell one from similar text (and a gateway tells a mistyped key without asking Redis).

The hash is HMAC-SHA256 with a salt for each key. A slow one as scrypt protects passwords, which can be
guessed. A random secret of 238 bits cannot be, however fast a guess is; and a key is checked with every
request, where a slow hash would cost 50 ms and let strangers keep a gateway busy.
"""

import hashlib
import hmac
import re
import secrets
import zlib
from datetime import datetime, timedelta
from string import ascii_lowercase, ascii_uppercase, digits

from pydantic import AwareDatetime, ValidationError

from gradcam_worker.errors import InvalidApiKey
from gradcam_worker.gateway.access.tenants import DEFAULT_SCOPES, Scope
from gradcam_worker.redis_server.client import RedisServer
from gradcam_worker.resilience.blocking import blocking, run_blocking
from gradcam_worker.schemas.ids import utc_now
from gradcam_worker.schemas.model import RequestModel, describe

MARK = "gck"
PREFIX_LENGTH, SECRET_LENGTH, CHECKSUM_LENGTH = 12, 40, 6
PREFIX_LETTERS = digits + ascii_lowercase
SECRET_LETTERS = digits + ascii_uppercase + ascii_lowercase
FORM = re.compile(rf"{MARK}_([0-9a-z]{{{PREFIX_LENGTH}}})_([0-9A-Za-z]{{{SECRET_LENGTH + CHECKSUM_LENGTH}}})")
NEVER_A_KEY = f"{MARK}_"  # an incomplete one, for comparisons that must fail


class ApiKey(RequestModel):
    """The record of a key. It does not contain the key."""

    prefix: str
    tenant: str
    salt: str
    digest: str
    scopes: tuple[Scope, ...]
    created_at: AwareDatetime
    expires_at: AwareDatetime | None = None
    revoked_at: AwareDatetime | None = None
    note: str = ""

    @classmethod
    def make(
        cls,
        tenant: str,
        *,
        scopes: tuple[Scope, ...] = DEFAULT_SCOPES,
        expires_at: datetime | None = None,
        note: str = "",
    ) -> tuple[str, "ApiKey"]:
        """Make a new key.

        Args:
            tenant: The tenant that it is of.
            scopes: What it may do, within what the tenant may do.
            expires_at: When it ceases to be valid; None: never.
            note: What it is for.

        Returns:
            The key, which is shown once and then known to nobody but its holder, and its record.
        """
        prefix = "".join(secrets.choice(PREFIX_LETTERS) for _ in range(PREFIX_LENGTH))
        body = f"{MARK}_{prefix}_" + "".join(secrets.choice(SECRET_LETTERS) for _ in range(SECRET_LENGTH))
        key, salt = body + _checksum(body), secrets.token_hex(16)
        record = cls(
            prefix=prefix,
            tenant=tenant,
            salt=salt,
            digest=_digest(salt, key),
            scopes=scopes,
            created_at=utc_now(),
            expires_at=expires_at,
            note=note,
        )
        return key, record

    def matches(self, key: str) -> bool:
        """Return whether this is the record of a key, in a time that does not depend on the key."""
        return hmac.compare_digest(_digest(self.salt, key), self.digest)

    def problem(self, now: datetime) -> str | None:
        """Describe why the key is not valid.

        Args:
            now: The current time.

        Returns:
            The predicate of a sentence; None if it is valid.
        """
        if self.revoked_at:
            return f"was revoked at {self.revoked_at:%Y-%m-%dT%H:%M:%SZ}"
        if self.expires_at and now >= self.expires_at:
            return f"expired at {self.expires_at:%Y-%m-%dT%H:%M:%SZ}"
        return None


def read_prefix(key: str) -> str | None:
    """Read the prefix of a key.

    Args:
        key: What was received.

    Returns:
        The prefix; None if the text has not the form of a key, or a wrong checksum.
    """
    match = FORM.fullmatch(key)
    whole = match and _checksum(key[:-CHECKSUM_LENGTH]) == key[-CHECKSUM_LENGTH:]
    return match[1] if match and whole else None


class ApiKeys:
    """The API keys in the ledger's Redis. Every method raises LedgerUnavailable if it is unreachable.

    `exist` and `find` can be awaited: see `gradcam_worker.resilience.blocking`.
    """

    def __init__(self, server: RedisServer) -> None:
        """`server`: the ledger's."""
        self._server = server
        self._key = f"{server.prefix}api_keys"

    @blocking
    async def exist(self) -> bool:
        """Return whether there is any key, also if none is valid any more."""
        (count,) = await self._server.ask_each([("HLEN", self._key)])
        return bool(count)

    @blocking
    async def find(self, prefix: str) -> ApiKey | None:
        """Find the record of a key, valid or not; None if there is none. Raises InvalidApiKey."""
        (text,) = await self._server.ask_each([("HGET", self._key, prefix)])
        return None if text is None else _read(prefix, str(text))

    def find_all(self) -> list[ApiKey]:
        """Find the records of all keys, in order of creation. Raises InvalidApiKey."""
        (texts,) = run_blocking(self._server.ask_each([("HGETALL", self._key)]))
        records = [_read(prefix, text) for prefix, text in texts.items()]
        return sorted(records, key=lambda record: record.created_at)

    def store(self, record: ApiKey) -> None:
        """Store the record of a key."""
        run_blocking(self._server.ask_each([("HSET", self._key, record.prefix, record.to_json())]))

    def revoke(self, record: ApiKey) -> ApiKey:
        """Revoke a key. Its record stays: without any record a gateway on this machine asks for no key.

        Args:
            record: The key's record.

        Returns:
            The new record; the same if it was revoked already.
        """
        if record.revoked_at is None:
            record = record.model_copy(update={"revoked_at": utc_now()})
            self.store(record)
        return record


def expiry(seconds: float | None) -> datetime | None:
    """Return the time in so many seconds; None for None."""
    return None if seconds is None else utc_now() + timedelta(seconds=seconds)


def _read(prefix: str, text: str) -> ApiKey:
    try:
        return ApiKey.model_validate_json(text)
    except ValidationError as error:
        message = f"The record of key {MARK}_{prefix} cannot be read by this version: {describe(error)}."
        raise InvalidApiKey(message) from error


def _digest(salt: str, key: str) -> str:
    return hmac.new(bytes.fromhex(salt), key.encode(), hashlib.sha256).hexdigest()


def _checksum(body: str) -> str:
    """CRC-32 in base 62, as other issuers of keys do it."""
    number, letters = zlib.crc32(body.encode()), ""
    for _ in range(CHECKSUM_LENGTH):
        number, at = divmod(number, len(SECRET_LETTERS))
        letters = SECRET_LETTERS[at] + letters
    return letters
