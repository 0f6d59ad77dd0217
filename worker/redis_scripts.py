"""What happens in Redis in one step: Lua, for `redis_ledger` and `redis_outbox`.

Every key begins with a prefix P, the first argument. Times are the server's own, in milliseconds: no two
workers' clocks have to agree. A job is a hash `job:<id>`, whose field `place` names the sorted set that the
job stands in:

    queued:<route>   by when its message was published
    retrying         by when its pause is over
    running          by when its lease runs out
    dead             failed, by when

Besides: `expiring` (waiting jobs, by when they expire), `canceling` (running jobs that are to stop),
`claimed` (for each route, the latest message that came through), `workers`, `reaper`, and the outbox.
There, `events:<recipient>` is a list of what a recipient is to be told, in order; `lane:<host>` holds the
recipients at one host, by when each is to be told next, and `outbox` the lanes, by when something may be
tried there. `down` counts the failures of a lane in a row, `tries` those of a recipient; `parked` holds who
could not be told, `gone` the addresses that want nothing any more, and `sinks` who is told of every job.
"""

_COMMON = """
local P = ARGV[1]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function put(lane, recipient, event, hook, document)
  redis.call('RPUSH', P .. 'events:' .. recipient, event .. '\\n' .. hook .. '\\n' .. document)
  if not redis.call('ZSCORE', P .. 'parked', recipient .. ' ' .. lane) then
    redis.call('ZADD', P .. 'lane:' .. lane, 'NX', now, recipient)
    redis.call('ZADD', P .. 'outbox', 'NX', now, lane)
  end
end

local function tell(id, hooks, event, document)
  if event == '' then return end
  if hooks and hooks ~= '' then
    for index, hook in ipairs(cjson.decode(hooks)) do
      for _, wanted in ipairs(hook.events) do
        if wanted == event then put(hook.lane, id .. ':hook' .. index, event, hook.text, document) end
      end
    end
  end
  for _, sink in ipairs(redis.call('SMEMBERS', P .. 'sinks')) do
    put(sink, id .. ':' .. sink, event, '', document)
  end
end

local function end_job(id, idempotency, retention, keyed_retention)
  local ttl = tonumber(retention)
  if idempotency and idempotency ~= '' then
    ttl = math.max(ttl, tonumber(keyed_retention))
    redis.call('PEXPIRE', idempotency, ttl)
  end
  redis.call('PEXPIRE', P .. 'job:' .. id, ttl)
end
"""

# ARGV: P, id, idempotency key or '', fingerprint, job, document, attempt, revision, status, route, webhooks
# or '', expires at (ms) or '', event, retention (ms), retention with an idempotency key (ms).
CREATE = (
    _COMMON
    + """
local id, idempotency, status, route = ARGV[2], ARGV[3], ARGV[9], ARGV[10]
local owner = idempotency ~= '' and redis.call('GET', idempotency) or id
local held = redis.call('HMGET', P .. 'job:' .. owner, 'fingerprint', 'job', 'document')
if not held[1] then held = redis.call('HMGET', P .. 'job:' .. id, 'fingerprint', 'job', 'document') end
if held[1] then return held end
local place = status == 'queued' and 'queued:' .. route or status == 'failed' and 'dead' or ''
redis.call('HSET', P .. 'job:' .. id, 'fingerprint', ARGV[4], 'job', ARGV[5], 'document', ARGV[6],
           'attempt', ARGV[7], 'revision', ARGV[8], 'idempotency', idempotency, 'route', route,
           'webhooks', ARGV[11], 'place', place)
if idempotency ~= '' then redis.call('SET', idempotency, id) end
if place ~= '' then redis.call('ZADD', P .. place, now, id) end
if status ~= 'queued' then end_job(id, idempotency, ARGV[14], ARGV[15])
elseif ARGV[12] ~= '' then redis.call('ZADD', P .. 'expiring', ARGV[12], id) end
tell(id, ARGV[11], ARGV[13], ARGV[6])
return {ARGV[4], ARGV[5], ARGV[6]}
"""
)

# ARGV: P, id, attempt and revision before, document, attempt, revision and status after, delay (ms),
# fingerprint or '', document before or '', expires at (ms) or '', 'canceling' or '', event, retention (ms),
# retention with an idempotency key (ms), lease (ms). The first lines let a write that is sent twice,
# because its reply was lost, succeed twice.
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
local place, before = '', held[5]
if status == 'queued' then place = 'queued:' .. held[6]
elseif status == 'running' or status == 'retrying' then place = status
elseif status == 'failed' then place = 'dead' end
redis.call('HSET', key, 'document', document, 'attempt', ARGV[6], 'revision', ARGV[7], 'place', place)
if before ~= place then
  if status == 'running' then
    local published = math.min(tonumber(redis.call('ZSCORE', P .. before, id) or 0), now)
    if published > tonumber(redis.call('HGET', P .. 'claimed', held[6]) or 0) then
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
if place == '' or place == 'dead' then end_job(id, held[8], ARGV[15], ARGV[16]) end
tell(id, held[7], ARGV[14], document)
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
  else redis.call('HDEL', P .. 'workers', all[index]) end
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
  found[index] = redis.call('ZRANGEBYSCORE', P .. name, '-inf', now, 'LIMIT', 0, ARGV[2])
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
for _, id in ipairs(ids) do
  local rung = redis.call('HINCRBY', P .. 'job:' .. id, 'rung', 1)
  local pause = math.min(lost_after * 2 ^ (rung - 1), tonumber(ARGV[6]))
  redis.call('ZADD', P .. 'queued:' .. route, now + pause - lost_after, id)
end
return ids
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

# ARGV: P, how many, of one lane, for how long the others keep away (ms)
# -> lane, recipient, its first event, how often and since when (ms) it was tried, now (ms)
TAKE = (
    _COMMON
    + """
local found = {}
for _, lane in ipairs(redis.call('ZRANGEBYSCORE', P .. 'outbox', '-inf', now, 'LIMIT', 0, ARGV[2])) do
  local key, most = P .. 'lane:' .. lane, ARGV[3]
  if redis.call('HEXISTS', P .. 'down', lane) == 1 then most = 1 end
  for _, recipient in ipairs(redis.call('ZRANGEBYSCORE', key, '-inf', now, 'LIMIT', 0, most)) do
    local first = redis.call('LINDEX', P .. 'events:' .. recipient, 0)
    if first then
      redis.call('ZADD', key, now + ARGV[4], recipient)
      local tried = redis.call('HGET', P .. 'tries', recipient) or '0 ' .. string.format('%.0f', now)
      found[#found + 1] = {lane, recipient, first, tried, string.format('%.0f', now)}
    else redis.call('ZREM', key, recipient) end
  end
  local next = redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')
  if next[1] then redis.call('ZADD', P .. 'outbox', math.max(tonumber(next[2]), now), lane)
  else redis.call('ZREM', P .. 'outbox', lane) end
end
return found
"""
)

# ARGV: P, lane, recipient, its first event: it is told, or it need not be
DELIVERED = (
    _COMMON
    + """
local lane, recipient, key = ARGV[2], ARGV[3], P .. 'events:' .. ARGV[3]
if redis.call('LINDEX', key, 0) ~= ARGV[4] then return 0 end
redis.call('LPOP', key)
redis.call('HDEL', P .. 'tries', recipient)
redis.call('HDEL', P .. 'down', lane)
if redis.call('EXISTS', key) == 1 then redis.call('ZADD', P .. 'lane:' .. lane, now, recipient)
else redis.call('ZREM', P .. 'lane:' .. lane, recipient) end
if redis.call('EXISTS', P .. 'lane:' .. lane) == 1 then redis.call('ZADD', P .. 'outbox', now, lane)
else redis.call('ZREM', P .. 'outbox', lane) end
return 1
"""
)

# ARGV: P, lane, recipient, delay (ms), how often it was tried, first pause of a lane, and its longest (ms)
# The lane is left alone, too, twice as long after each failure in a row.
POSTPONE = (
    _COMMON
    + """
local lane, recipient = ARGV[2], ARGV[3]
local tried = redis.call('HGET', P .. 'tries', recipient) or ''
local first = string.match(tried, '%d+$') or string.format('%.0f', now)
redis.call('HSET', P .. 'tries', recipient, ARGV[5] .. ' ' .. first)
redis.call('ZADD', P .. 'lane:' .. lane, 'XX', now + ARGV[4], recipient)
local failures = redis.call('HINCRBY', P .. 'down', lane, 1)
local pause = math.min(ARGV[6] * 2 ^ math.min(failures - 1, 20), tonumber(ARGV[7]))
redis.call('ZADD', P .. 'outbox', 'XX', now + pause, lane)
return 1
"""
)

# ARGV: P, lane, recipient, retention (ms): nobody tries any more, until it is replayed
PARK = (
    _COMMON
    + """
local lane, recipient = ARGV[2], ARGV[3]
redis.call('ZREM', P .. 'lane:' .. lane, recipient)
redis.call('HDEL', P .. 'tries', recipient)
redis.call('ZADD', P .. 'parked', now, recipient .. ' ' .. lane)
redis.call('PEXPIRE', P .. 'events:' .. recipient, ARGV[4])
return 1
"""
)

# ARGV: P, lane, recipient
UNPARK = (
    _COMMON
    + """
local lane, recipient = ARGV[2], ARGV[3]
if redis.call('ZREM', P .. 'parked', recipient .. ' ' .. lane) == 0 then return 0 end
if redis.call('PERSIST', P .. 'events:' .. recipient) == 0 then return 0 end
redis.call('ZADD', P .. 'lane:' .. lane, now, recipient)
redis.call('ZADD', P .. 'outbox', 'NX', now, lane)
return 1
"""
)

# ARGV: P, address, for how long (ms): it wants nothing any more
DISABLE = (
    _COMMON
    + """
redis.call('ZREMRANGEBYSCORE', P .. 'gone', '-inf', now)
redis.call('ZADD', P .. 'gone', now + ARGV[3], ARGV[2])
return 1
"""
)
