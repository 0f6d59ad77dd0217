"""What happens in the ledger in Redis in one step: Lua, for `redis_ledger`.

Every key begins with a prefix P, the first argument. Times are the server's own, in milliseconds: no two
workers' clocks have to agree. A job is a hash `job:<id>`, whose field `place` names the sorted set that the
job stands in:

    queued:<route>   by when its message was published
    retrying         by when its pause is over
    running          by when its lease runs out
    dead             failed, by when

Besides: `expiring` (waiting jobs, by when they expire), `canceling` (running jobs that are to stop),
`claimed` (for each route, the latest message that came through), `workers`, `reaper`, and the outbox: see
`outbox_scripts`; and for a quarter of an hour `ended:<minute>`: how many jobs ended in it, by route and
state, as a courtesy (pcall) to whoever looks on. On the channel `changed:<id>` it is told that a job's
document has a new revision.
"""

from gradcam_worker.ledger.redis.outbox_scripts import NOW, TELL

_COMMON = (
    NOW
    + TELL
    + """
local function end_job(id, idempotency, retention, keyed_retention, route, status)
  local key = P .. 'ended:' .. ms(math.floor(now / 60000))
  if redis.pcall('HINCRBY', key, route .. ' ' .. status, 1) == 1 then redis.pcall('PEXPIRE', key, 900000) end
  local ttl = tonumber(retention)
  if idempotency and idempotency ~= '' then
    ttl = math.max(ttl, tonumber(keyed_retention))
    redis.call('PEXPIRE', idempotency, ttl)
  end
  redis.call('PEXPIRE', P .. 'job:' .. id, ttl)
end

local function revive(id, idempotency)
  redis.call('PERSIST', P .. 'job:' .. id)
  if not idempotency or idempotency == '' then return end
  local owner = redis.call('GET', idempotency)
  if owner == id then redis.call('PERSIST', idempotency)
  elseif not owner then redis.call('SET', idempotency, id) end
end
"""
)

# ARGV: P, retention (ms), retention with an idempotency key (ms), and of each job: id, idempotency key or '',
# fingerprint, job, document, attempt, revision, status, route, webhooks or '', expires at (ms) or '', event.
# -> of each what was there before, or {}. Ends with the first that is another's: what follows is not entered.
CREATE = (
    _COMMON
    + """
local retention, keyed_retention, found = ARGV[2], ARGV[3], {}
for at = 4, #ARGV, 12 do
  local id, idempotency, fingerprint, job, document, attempt, revision, status, route, webhooks, expires,
        event = unpack(ARGV, at, at + 11)
  local owner = idempotency ~= '' and redis.call('GET', idempotency) or id
  local held = redis.call('HMGET', P .. 'job:' .. owner, 'fingerprint', 'job', 'document')
  if not held[1] and owner ~= id then
    held = redis.call('HMGET', P .. 'job:' .. id, 'fingerprint', 'job', 'document')
  end
  if held[1] then
    found[#found + 1] = held
    if held[1] ~= fingerprint then break end
  else
    found[#found + 1] = {}
    local place = status == 'queued' and 'queued:' .. route or status == 'failed' and 'dead' or ''
    redis.call('HSET', P .. 'job:' .. id, 'fingerprint', fingerprint, 'job', job, 'document', document,
               'attempt', attempt, 'revision', revision, 'idempotency', idempotency, 'route', route,
               'webhooks', webhooks, 'place', place)
    if idempotency ~= '' then redis.call('SET', idempotency, id) end
    if place ~= '' then redis.call('ZADD', P .. place, now, id) end
    if status ~= 'queued' then end_job(id, idempotency, retention, keyed_retention, route, status)
    elseif expires ~= '' then redis.call('ZADD', P .. 'expiring', expires, id) end
    tell(id, webhooks, event, document, retention)
  end
end
return found
"""
)

# ARGV: P, id, attempt and revision before, document, attempt, revision and status after, delay (ms),
# fingerprint or '', document before or '', expires at (ms) or '', 'canceling' or '', event, retention (ms),
# retention with an idempotency key (ms), lease (ms), and 'due' or '': only if its lease, or its pause, is
# over now. Only a job that stands where it was published first says how far its route has come. The first
# lines let a write that is sent twice, because its reply was lost, succeed twice. The last ones forget the
# job of a document that is all there is left to say: a presigned address must not lie about. A failed one
# may be run again, and keeps its own; once it is, nothing of it lapses any more. Who waits for it is told
# that it has changed: as a courtesy (pcall), since it is no reason to change nothing where this may not be
# told.
SWAP = (
    _COMMON
    + """
local id, document, status, delay = ARGV[2], ARGV[5], ARGV[8], tonumber(ARGV[9])
local key = P .. 'job:' .. id
local held = redis.call('HMGET', key, 'attempt', 'revision', 'document', 'fingerprint', 'place', 'route',
                        'webhooks', 'idempotency')
if held[3] == document then return 1 end
if held[1] ~= ARGV[3] or held[2] ~= ARGV[4] then return 0 end
if ARGV[10] ~= '' and (held[4] ~= ARGV[10] or held[3] ~= ARGV[11]) then return 0 end
if ARGV[18] ~= '' and tonumber(redis.call('ZSCORE', P .. held[5], id) or 0) > now then return 0 end
local place, before = '', held[5]
if status == 'queued' then place = 'queued:' .. held[6]
elseif status == 'running' or status == 'retrying' then place = status
elseif status == 'failed' then place = 'dead' end
if before == 'dead' and place ~= 'dead' then revive(id, held[8]) end
redis.call('HSET', key, 'document', document, 'attempt', ARGV[6], 'revision', ARGV[7], 'place', place)
if before ~= place then
  if status == 'running' then
    local published = math.min(tonumber(redis.call('ZSCORE', P .. before, id) or 0), now)
    local first = held[1] == '0' and not redis.call('HGET', key, 'rung')
    if first and published > tonumber(redis.call('HGET', P .. 'claimed', held[6]) or 0) then
      redis.call('HSET', P .. 'claimed', held[6], string.format('%.0f', published))
    end
    delay = tonumber(ARGV[17])
  end
  if before ~= '' then redis.call('ZREM', P .. before, id) end
  if place ~= '' then redis.call('ZADD', P .. place, now + delay, id) end
  if status == 'queued' then redis.call('HDEL', key, 'rung') end
end
if ARGV[12] ~= '' then
  if status == 'queued' or status == 'retrying' then redis.call('ZADD', P .. 'expiring', ARGV[12], id)
  else redis.call('ZREM', P .. 'expiring', id) end
end
if ARGV[13] ~= '' then
  if status == 'running' then redis.call('SADD', P .. 'canceling', id)
  else redis.call('SREM', P .. 'canceling', id) end
end
if place == '' or place == 'dead' then end_job(id, held[8], ARGV[15], ARGV[16], held[6], status) end
tell(id, held[7], ARGV[14], document, ARGV[15])
if place == '' then redis.call('HSET', key, 'job', 'null', 'webhooks', '') end
redis.pcall('PUBLISH', P .. 'changed:' .. id, ARGV[7])
return 1
"""
)

# ARGV: P, lease (ms), worker, health, then id and attempt of each job held.
# -> the ids that are lost, and those that are to stop
BEAT = (
    _COMMON
    + """
local lost = {}
redis.call('HSET', P .. 'workers', ARGV[3], string.format('%.0f', now) .. ' ' .. ARGV[4])
for index = 5, #ARGV, 2 do
  local held = redis.call('HMGET', P .. 'job:' .. ARGV[index], 'attempt', 'place')
  if held[1] == ARGV[index + 1] and held[2] == 'running' then
    redis.call('ZADD', P .. 'running', now + ARGV[2], ARGV[index])
  else lost[#lost + 1] = ARGV[index] end
end
return {lost, redis.call('SMEMBERS', P .. 'canceling')}
"""
)

# ARGV: P, how long they are remembered (ms) -> worker, health, ...
WORKERS = (
    _COMMON
    + """
local found = {}
local all = redis.call('HGETALL', P .. 'workers')
for index = 1, #all, 2 do
  local at = tonumber(string.match(all[index + 1], '^%d+'))
  if at > now - ARGV[2] then
    found[#found + 1] = all[index]
    found[#found + 1] = string.match(all[index + 1], '^%d+ (.*)$')
  else redis.pcall('HDEL', P .. 'workers', all[index]) end  -- not every asker may
end
return found
"""
)

# ARGV: P, worker, for how long (ms)
LEAD = (
    _COMMON
    + """
local leader = redis.call('GET', P .. 'reaper')
if leader and leader ~= ARGV[2] then return 0 end
redis.call('SET', P .. 'reaper', ARGV[2], 'PX', ARGV[3])
return 1
"""
)

# ARGV: P, how many -> ids of jobs with a lost lease, with a pause that is over, and expired ones
OVERDUE = (
    _COMMON
    + """
local found = {}
for index, name in ipairs({'running', 'retrying', 'expiring'}) do
  found[index] = {}
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', P .. name, '-inf', now, 'LIMIT', 0, ARGV[2])) do
    if redis.call('EXISTS', P .. 'job:' .. id) == 1 then table.insert(found[index], id)
    else redis.call('ZREM', P .. name, id) end
  end
end
return found
"""
)

# ARGV: P, route, 'empty' or '', lost after (ms), how many, longest pause (ms) Each time that a job is
# named, it waits twice as long for the next time: its message may only be slow to come.
SILENT = (
    _COMMON
    + """
local route, lost_after = ARGV[2], tonumber(ARGV[4])
local newest = ARGV[3] == 'empty' and now or tonumber(redis.call('HGET', P .. 'claimed', route) or 0)
local ids = redis.call('ZRANGEBYSCORE', P .. 'queued:' .. route, '-inf', math.min(newest, now) - lost_after,
                       'LIMIT', 0, ARGV[5])
local named = {}
for _, id in ipairs(ids) do
  if redis.call('EXISTS', P .. 'job:' .. id) == 0 then redis.call('ZREM', P .. 'queued:' .. route, id)
  else
  table.insert(named, id)
  local rung = redis.call('HINCRBY', P .. 'job:' .. id, 'rung', 1)
  local pause = math.min(lost_after * 2 ^ (rung - 1), tonumber(ARGV[6]))
  redis.call('ZADD', P .. 'queued:' .. route, now + pause - lost_after, id)
  end
end
return named
"""
)

# ARGV: P, retention (ms): dead letters and parked events of long ago are forgotten
SWEEP = (
    _COMMON
    + """
for _, name in ipairs({'dead', 'parked'}) do
  redis.call('ZREMRANGEBYSCORE', P .. name, '-inf', now - ARGV[2])
end
return 1
"""
)
