"""How much waits in the ledger and in its outbox, and for how long: one question, answered by the server."""

from typing import Any

from gradcam_worker.ledger.redis.client import RedisServer
from gradcam_worker.ledger.redis.outbox_scripts import NOW
from gradcam_worker.ledger.redis.store import LIVES
from gradcam_worker.observability.queue_depths import QueueDepths
from gradcam_worker.schemas.shard import ROUTES

SCANNED = (
    10_000  # recipients whose events are looked at for the oldest: a few milliseconds of the server's time
)

# ARGV: P, how long workers are remembered (ms), how many recipients are looked at, then routes
# -> retrying, running, dead, recipients, age of the oldest event (ms), workers, then of each route how many
# are queued and the age of the oldest (ms). The age of what does not exist is 0.
DEPTHS = (
    NOW
    + """
local function age(since) return math.max(now - tonumber(since or now), 0) end
local workers = 0
for _, said in ipairs(redis.call('HVALS', P .. 'workers')) do
  if tonumber(string.match(said, '^%d+')) > now - ARGV[2] then workers = workers + 1 end
end
local oldest = now
local waiting = redis.call('HSCAN', P .. 'waiting', 0, 'COUNT', ARGV[3])[2]
for index = 2, #waiting, 2 do
  oldest = math.min(oldest, tonumber(string.match(waiting[index], '%d+$')))
end
local found = {}
for _, name in ipairs({'retrying', 'running', 'dead'}) do
  found[#found + 1] = redis.call('ZCARD', P .. name)
end
found[#found + 1] = redis.call('HLEN', P .. 'waiting')
found[#found + 1] = age(oldest)
found[#found + 1] = workers
for index = 4, #ARGV do
  local key = P .. 'queued:' .. ARGV[index]
  found[#found + 1] = redis.call('ZCARD', key)
  found[#found + 1] = age(redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')[2])
end
return found
"""
)


def read_depths(server: RedisServer, lease_s: float) -> QueueDepths:
    """Ask the ledger's server: one round trip. Raises LedgerUnavailable."""
    found: Any = server.run(DEPTHS, int(LIVES * lease_s * 1000), SCANNED, *ROUTES)
    retrying, running, dead, events, event_ms, workers, *routes = map(int, found)
    return QueueDepths(
        queued=dict(zip(ROUTES, routes[::2], strict=True)),
        oldest_s={route: ms / 1000 for route, ms in zip(ROUTES, routes[1::2], strict=True)},
        retrying=retrying,
        running=running,
        dead=dead,
        events=events,
        oldest_event_s=event_ms / 1000,
        workers=workers,
    )
