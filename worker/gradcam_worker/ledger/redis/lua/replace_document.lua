-- Replace a job's document by its next revision, if (attempt, revision) are still those of before; returns
-- whether they were. In the same step the job moves to the place that its new status has, and its event goes
-- into the outbox.
local prefix = ARGV[1]
local job_id = ARGV[2]
local attempt_before = ARGV[3]
local revision_before = ARGV[4]
local document = ARGV[5]
local attempt = ARGV[6]
local revision = ARGV[7]
local status = ARGV[8]
local delay_ms = tonumber(ARGV[9]) -- the pause before the next attempt
local fingerprint = ARGV[10] -- '': not compared, and neither is document_before
local document_before = ARGV[11]
local expires_ms = tonumber(ARGV[12]) -- nil: never
local cancel_requested = ARGV[13] == '1'
local event = ARGV[14] -- '': none
local retention_ms = tonumber(ARGV[15])
local keyed_retention_ms = tonumber(ARGV[16]) -- of a job with an idempotency key
local lease_ms = tonumber(ARGV[17])
local only_if_due = ARGV[18] == '1' -- only if its lease, or its pause, is over now

-- include: clock
-- include: events
-- include: retention

local key = prefix .. 'job:' .. job_id
local held_attempt, held_revision, held_document, held_fingerprint, place_before, route, webhooks,
      idempotency = unpack(redis.call('HMGET', key, 'attempt', 'revision', 'document', 'fingerprint', 'place',
                                      'route', 'webhooks', 'idempotency'))

-- A write that is sent twice, because its reply was lost, succeeds twice.
if held_document == document then return 1 end
if held_attempt ~= attempt_before or held_revision ~= revision_before then return 0 end
if fingerprint ~= '' and held_fingerprint ~= fingerprint then return 0 end
if fingerprint ~= '' and held_document ~= document_before then return 0 end
if only_if_due and tonumber(redis.call('ZSCORE', prefix .. place_before, job_id) or 0) > now then return 0 end

local place = ''
if status == 'queued' then place = 'queued:' .. route
elseif status == 'running' or status == 'retrying' then place = status
elseif status == 'failed' then place = 'dead' end

-- A failed job runs again: nothing of it may expire any more.
local function end_retention()
  redis.call('PERSIST', key)
  if not idempotency or idempotency == '' then return end
  local owner = redis.call('GET', idempotency)
  if owner == job_id then redis.call('PERSIST', idempotency)
  elseif not owner then redis.call('SET', idempotency, job_id) end
end

-- Only a job that stands where it was published first says how far its route has come.
local function note_claim()
  local published = math.min(tonumber(redis.call('ZSCORE', prefix .. place_before, job_id) or 0), now)
  local first = held_attempt == '0' and not redis.call('HGET', key, 'rung')
  if first and published > tonumber(redis.call('HGET', prefix .. 'claimed', route) or 0) then
    redis.call('HSET', prefix .. 'claimed', route, whole(published))
  end
end

if place_before == 'dead' and place ~= 'dead' then end_retention() end
redis.call('HSET', key, 'document', document, 'attempt', attempt, 'revision', revision, 'place', place)
if place_before ~= place then
  if status == 'running' then note_claim() end
  if place_before ~= '' then redis.call('ZREM', prefix .. place_before, job_id) end
  if place ~= '' then
    redis.call('ZADD', prefix .. place, now + (status == 'running' and lease_ms or delay_ms), job_id)
  end
  if status == 'queued' then redis.call('HDEL', key, 'rung') end
end
if expires_ms then
  local waits = status == 'queued' or status == 'retrying'
  if waits then redis.call('ZADD', prefix .. 'expiring', expires_ms, job_id)
  else redis.call('ZREM', prefix .. 'expiring', job_id) end
end
if cancel_requested then
  if status == 'running' then redis.call('SADD', prefix .. 'canceling', job_id)
  else redis.call('SREM', prefix .. 'canceling', job_id) end
end
if place == '' or place == 'dead' then
  begin_retention(job_id, idempotency, retention_ms, keyed_retention_ms, route, status)
end
record_event(job_id, webhooks, event, document, retention_ms)
-- A presigned address must not stay in the server. A failed job may be run again, and keeps its own.
if place == '' then redis.call('HSET', key, 'job', 'null', 'webhooks', '') end
-- By pcall: who may not publish must be able to change the job all the same.
redis.pcall('PUBLISH', prefix .. 'changed:' .. job_id, revision)
return 1
