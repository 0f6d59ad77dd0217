"""The ledger in Redis: two scripts, each one atomic step."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from worker.contract import StatusDocument
from worker.errors import LedgerUnavailable
from worker.ledger import Entry, Ledger
from worker.settings import without_secrets

# A job is a hash. The sorted sets `queued` and `running` hold the ids of all jobs that are not final,
# by the time they came there. KEYS: job, idempotency (or ""), queued, running.
_CREATE = """
local prefix, id, ttl = ARGV[1], ARGV[2], ARGV[3]
local owner = KEYS[2] ~= '' and redis.call('GET', KEYS[2]) or id
local held = redis.call('HMGET', prefix .. owner, 'fingerprint', 'job', 'document')
if not held[1] then held = redis.call('HMGET', KEYS[1], 'fingerprint', 'job', 'document') end
if held[1] then return held end
redis.call('HSET', KEYS[1], 'fingerprint', ARGV[4], 'job', ARGV[5], 'document', ARGV[6],
           'attempt', ARGV[7], 'revision', ARGV[8], 'idempotency', KEYS[2])
if KEYS[2] ~= '' then redis.call('SET', KEYS[2], id) end
if ARGV[9] == 'final' then redis.call('PEXPIRE', KEYS[1], ttl)
else redis.call('ZADD', KEYS[3], ARGV[10], id) end
return {ARGV[4], ARGV[5], ARGV[6]}
"""

# The first lines let a write that is sent twice, because its reply was lost, succeed twice.
_SWAP = """
local held = redis.call('HMGET', KEYS[1], 'attempt', 'revision', 'document', 'idempotency', 'fingerprint')
if held[3] == ARGV[5] then return 1 end
if held[1] ~= ARGV[3] or held[2] ~= ARGV[4] then return 0 end
if ARGV[10] ~= '' and (held[5] ~= ARGV[10] or held[3] ~= ARGV[11]) then return 0 end
redis.call('HSET', KEYS[1], 'document', ARGV[5], 'attempt', ARGV[6], 'revision', ARGV[7])
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
if ARGV[8] == 'final' then
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  if held[4] and held[4] ~= '' then redis.call('PEXPIRE', held[4], ARGV[2]) end
else redis.call('ZADD', ARGV[8] == 'running' and KEYS[3] or KEYS[2], ARGV[9], ARGV[1]) end
return 1
"""


class RedisLedger(Ledger):
    """The ledger in one Redis or Valkey server; not on a Redis Cluster."""

    def __init__(self, url: str, *, prefix: str, retention_s: float, timeout_s: float = 5) -> None:
        """`prefix` starts every key; `retention_s` is how long a final job stays readable.

        `timeout_s` is how long one answer may take; each question is asked three times at most.
        """
        self._place = without_secrets(url)
        self._prefix = f"{prefix}job:"
        self._keys = prefix
        self._retention_ms = int(retention_s * 1000)
        self._redis = redis.Redis.from_url(
            url,
            decode_responses=True,
            socket_timeout=timeout_s,
            socket_connect_timeout=min(timeout_s, 3),
            socket_keepalive=True,
            health_check_interval=15,
            retry=Retry(ExponentialBackoff(cap=0.5, base=0.05), retries=2),
        )
        self._create_script = self._redis.register_script(_CREATE)
        self._swap_script = self._redis.register_script(_SWAP)

    def _create(self, entry: Entry) -> Entry:
        document, key = entry.document, entry.idempotency_key
        digest = hashlib.sha256((key or "").encode()).hexdigest()
        idempotency = f"{self._keys}idempotency:{digest}" if key else ""
        with self._reaching():
            fingerprint, job, text = self._create_script(
                keys=[self._prefix + document.id, idempotency, *self._open()],
                args=[
                    self._prefix,
                    document.id,
                    self._retention_ms,
                    entry.fingerprint,
                    entry.job,
                    document.to_json(),
                    document.attempt,
                    document.revision,
                    "final" if document.final else document.status,
                    document.updated_at.timestamp(),
                ],
            )
        return Entry(fingerprint, job, key, StatusDocument.model_validate_json(text))

    def _find(self, job_id: str) -> Entry | None:
        names = ("fingerprint", "job", "document")
        with self._reaching():
            fingerprint, job, text = self._redis.hmget(self._prefix + job_id, *names)
        if fingerprint is None:
            return None
        return Entry(str(fingerprint), str(job), None, StatusDocument.model_validate_json(str(text)))

    def _swap(self, before: StatusDocument, after: StatusDocument, fingerprint: str | None = None) -> bool:
        with self._reaching():
            return bool(
                self._swap_script(
                    keys=[self._prefix + before.id, *self._open()],
                    args=[
                        before.id,
                        self._retention_ms,
                        before.attempt,
                        before.revision,
                        after.to_json(),
                        after.attempt,
                        after.revision,
                        "final" if after.final else after.status,
                        after.updated_at.timestamp(),
                        fingerprint or "",
                        before.to_json() if fingerprint else "",
                    ],
                )
            )

    def read_many(self, ids: Sequence[str]) -> dict[str, StatusDocument]:
        """See `Ledger.read_many`: one round trip."""
        with self._reaching(), self._redis.pipeline(transaction=False) as pipeline:
            for job_id in ids:
                pipeline.hget(self._prefix + job_id, "document")
            texts = pipeline.execute()
        return {
            job_id: StatusDocument.model_validate_json(text)
            for job_id, text in zip(ids, texts, strict=True)
            if text
        }

    def counts(self) -> tuple[int, int]:
        """See `Ledger.counts`."""
        with self._reaching(), self._redis.pipeline(transaction=False) as pipeline:
            for key in self._open():
                pipeline.zcard(key)
            queued, running = pipeline.execute()
        return queued, running

    def _open(self) -> tuple[str, str]:
        """The sorted sets of jobs that are not final."""
        return f"{self._keys}queued", f"{self._keys}running"

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except redis.RedisError as error:
            message = f"The ledger at {self._place} cannot be reached ({error})."
            raise LedgerUnavailable(message) from error
