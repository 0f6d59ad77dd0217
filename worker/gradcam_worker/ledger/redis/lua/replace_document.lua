-- Replace a job's document by its next revision, if the current attempt and revision are the expected ones.
-- Returns 1 if it was replaced, 0 if it was not. The same step moves the job to the sorted set of its new
-- status, and records its event in the outbox. A claim in turn may return the job whose turn it is instead, as
-- fingerprint, job, document, route and tenant.
local prefix = ARGV[1]
local job_id = ARGV[2]
local attempt_before = ARGV[3]
local revision_before = ARGV[4]
local document = ARGV[5]
local attempt = ARGV[6]
local revision = ARGV[7]
local status = ARGV[8]
local delay_ms = tonumber(ARGV[9]) -- before the next attempt
local fingerprint = ARGV[10] -- '': neither it nor document_before is compared
local document_before = ARGV[11]
local expires_ms = tonumber(ARGV[12]) -- nil: never
local cancel_requested = ARGV[13] == '1'
local event = ARGV[14] -- '': none
local retention_ms = tonumber(ARGV[15])
local keyed_retention_ms = tonumber(ARGV[16]) -- of a job with an idempotency key
local lease_ms = tonumber(ARGV[17])
local only_if_due = ARGV[18] == '1' -- replace only if the lease or the pause is over
local status_before = ARGV[19]
local created_us = ARGV[20]
local device_us = ARGV[21] -- for which a job that has ended used the device
local in_turn = ARGV[22] == '1' -- a claim for a message of this job; a queued job waits for its turn

-- include: clock
-- include: events
-- include: listing
-- include: retention
-- include: turns
-- include: usage

local key = prefix .. 'job:' .. job_id
local held_attempt, held_revision, held_document, held_fingerprint, place_before, route, webhooks,
      idempotency, tenant, share = unpack(redis.call('HMGET', key, 'attempt', 'revision', 'document', 'fingerprint',
                                              'place', 'route', 'webhooks', 'idempotency', 'tenant', 'share'))
tenant, share = tenant or '', tonumber(share or 1) -- jobs of nobody have neither

-- A write that is repeated because its reply was lost succeeds again.
if held_document == document then return 1 end
if held_attempt ~= attempt_before or held_revision ~= revision_before then return 0 end
if fingerprint ~= '' and held_fingerprint ~= fingerprint then return 0 end
if fingerprint ~= '' and held_document ~= document_before then return 0 end
if only_if_due and tonumber(redis.call('ZSCORE', prefix .. place_before, job_id) or 0) > now then return 0 end

if in_turn and status == 'running' then
  local chosen_id = choose_job(route, tenant, job_id)
  if chosen_id ~= job_id then
    pass_over(route, tenant, job_id)
    return describe_job(chosen_id)
  end
end

local place = ''
if status == 'queued' then place = 'queued:' .. route
elseif status == 'running' or status == 'retrying' then place = status
elseif status == 'failed' then place = 'dead' end

-- A failed job is retried: its keys must not expire.
local function end_retention()
  redis.call('PERSIST', key)
  if not idempotency or idempotency == '' then return end
  local owner = redis.call('GET', idempotency)
  if owner == job_id then redis.call('PERSIST', idempotency)
  elseif not owner then redis.call('SET', idempotency, job_id) end
end

-- Note when the latest received message was published. Only a job that was published once tells that, and that
-- was claimed for its own message.
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
  if status == 'running' and in_turn then note_claim() end
  if place_before ~= '' then redis.call('ZREM', prefix .. place_before, job_id) end
  if place ~= '' then
    redis.call('ZADD', prefix .. place, now + (status == 'running' and lease_ms or delay_ms), job_id)
  end
  if status == 'queued' then redis.call('HDEL', key, 'rung') end
  -- By pcall: a user without permission for the turns must still be able to change jobs.
  if place_before == 'queued:' .. route then
    pcall(leave_turns, route, tenant, job_id, status == 'running' and 1 / share or 0)
  end
  if status == 'queued' and in_turn then pcall(join_turns, route, tenant, job_id, now, share) end
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
  if tenant ~= '' then pcall(count_usage, tenant, device_us) end
end
if status ~= status_before and route ~= 'shard' then
  local longest_ms = math.max(retention_ms, keyed_retention_ms)
  pcall(relist_job, tenant, status_before, status, created_us, job_id, longest_ms)
end
record_event(job_id, webhooks, event, document, retention_ms)
-- The job may contain presigned URLs, which must not be kept. A failed job keeps them, for a retry.
if place == '' then redis.call('HSET', key, 'job', 'null', 'webhooks', '') end
-- By pcall: a user without permission to publish must still be able to change the job.
redis.pcall('PUBLISH', prefix .. 'changed:' .. job_id, revision)
return 1
