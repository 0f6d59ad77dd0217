-- Enter jobs, in order, and publish those that come with a message. Returns for each {} if it is new,
-- {'published'} if its message is in the queue, too, else the existing fingerprint, job, document and tenant.
-- Stops at the first whose id or idempotency key belongs to a different job, or whose id belongs to another
-- tenant's: the jobs after it are not entered.
-- include: records
local prefix = ARGV[1]
local retention_ms = tonumber(ARGV[2])
local keyed_retention_ms = tonumber(ARGV[3]) -- of a job with an idempotency key
local replicated = ARGV[4] == '1' -- whether the caller waits for replicas
local jobs = records(5, 'job_id', 'idempotency', 'fingerprint', 'job', 'document', 'attempt', 'revision',
                     'status', 'route', 'webhooks', 'expires_ms', 'event', 'tenant', 'created_us', 'lists', 'share',
                     'queue', 'message')

-- include: clock
-- include: events
-- include: listing
-- include: retention
-- include: turns

local function find(job_id)
  local held = redis.call('HMGET', prefix .. 'job:' .. job_id, 'fingerprint', 'job', 'document', 'tenant')
  held[4] = held[4] or '' -- also of jobs that earlier versions have entered
  return held
end

local function enter(new)
  local place = new.status == 'queued' and 'queued:' .. new.route or new.status == 'failed' and 'dead' or ''
  redis.call('HSET', prefix .. 'job:' .. new.job_id, 'fingerprint', new.fingerprint, 'job', new.job,
             'document', new.document, 'attempt', new.attempt, 'revision', new.revision,
             'idempotency', new.idempotency, 'route', new.route, 'webhooks', new.webhooks, 'place', place)
  if new.tenant ~= '' then
    redis.call('HSET', prefix .. 'job:' .. new.job_id, 'tenant', new.tenant, 'share', new.share)
  end
  if new.idempotency ~= '' then redis.call('SET', new.idempotency, new.job_id) end
  if place ~= '' then redis.call('ZADD', prefix .. place, now, new.job_id) end
  if new.status ~= 'queued' then
    begin_retention(new.job_id, new.idempotency, retention_ms, keyed_retention_ms, new.route, new.status)
  elseif new.expires_ms ~= '' then
    redis.call('ZADD', prefix .. 'expiring', new.expires_ms, new.job_id)
  end
  if new.status == 'queued' then pcall(join_turns, new.route, new.tenant, new.job_id, now, new.share) end
  record_event(new.job_id, new.webhooks, new.event, new.document, retention_ms)
  return new.queue ~= '' and pcall(redis.call, 'LPUSH', new.queue, new.message)
end

local reply, entered = {}, {}
for _, new in ipairs(jobs) do
  local owner = new.idempotency ~= '' and redis.call('GET', new.idempotency) or new.job_id
  local held = find(owner)
  if not held[1] and owner ~= new.job_id then
    owner = new.job_id
    held = find(owner)
  end
  if held[1] then
    reply[#reply + 1] = held
    local is_other_tenants = new.tenant ~= '' and new.tenant ~= held[4]
    if held[1] ~= new.fingerprint or is_other_tenants then break end
    -- WAIT asks for what its own connection has written, and another one may have entered this job just now.
    if replicated then redis.call('HSET', prefix .. 'job:' .. owner, 'fingerprint', held[1]) end
  else
    reply[#reply + 1] = enter(new) and {'published'} or {}
    entered[#entered + 1] = new
  end
end
pcall(list_new_jobs, entered, math.max(retention_ms, keyed_retention_ms))
return reply
