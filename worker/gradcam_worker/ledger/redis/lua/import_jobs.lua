-- Enter exported jobs, in order, each whole or not at all. Returns for each what became of it: added; updated:
-- the ledger had an earlier revision; kept: it has this one, a later one, or a final one; superseded: the
-- idempotency key is another job's by now. Nothing is changed if `dry`.
-- include: records
local prefix = ARGV[1]
local dry = ARGV[2] == '1'
local lease_ms = tonumber(ARGV[3])
local retention_ms = tonumber(ARGV[4]) -- the longest one
local jobs = records(5, 'job_id', 'idempotency', 'fingerprint', 'job', 'document', 'attempt', 'revision', 'status',
                     'route', 'webhooks', 'expires_ms', 'tenant', 'share', 'created_us', 'lists', 'cancel', 'ttl_ms',
                     'score', 'recipients')

-- include: clock
-- include: events
-- include: listing
-- include: parking
-- include: turns

local function place_of(new)
  if new.status == 'queued' then return 'queued:' .. new.route end
  if new.status == 'running' or new.status == 'retrying' then return new.status end
  return new.status == 'failed' and 'dead' or ''
end

-- A job that runs keeps its worker, if that lives: it renews the lease. The message of a queued one is published
-- after the import.
local function score_of(new)
  if new.status == 'running' then return now + lease_ms end
  return new.status == 'queued' and now or tonumber(new.score) or now
end

local function is_final(place) return place == '' or place == 'dead' end

local function decide(new, held)
  if not held[1] then
    local owner = new.idempotency ~= '' and redis.call('GET', prefix .. new.idempotency)
    local has_other = owner and owner ~= new.job_id and redis.call('EXISTS', prefix .. 'job:' .. owner) == 1
    return has_other and not is_final(place_of(new)) and 'superseded' or 'added'
  end
  local attempt, revision = tonumber(held[1]), tonumber(held[2])
  local further = tonumber(new.attempt) > attempt
  local is_later = further or tonumber(new.attempt) == attempt and tonumber(new.revision) > revision
  if held[5] ~= new.fingerprint or not is_later then return 'kept' end
  if is_final(held[3]) and not (held[3] == 'dead' and further) then return 'kept' end
  return 'updated'
end

-- Remove what an earlier revision has left in sorted sets.
local function leave_place(new, held)
  redis.call('PERSIST', prefix .. 'job:' .. new.job_id)
  if held[3] ~= '' then redis.call('ZREM', prefix .. held[3], new.job_id) end
  if held[3] == 'queued:' .. new.route then pcall(leave_turns, new.route, new.tenant, new.job_id, 0) end
  redis.call('ZREM', prefix .. 'expiring', new.job_id)
  redis.call('SREM', prefix .. 'canceling', new.job_id)
  local status = cjson.decode(held[4]).status
  for _, scope in ipairs(list_scopes(new.tenant)) do
    redis.pcall('ZREM', list_key(scope, 'status:' .. status), new.job_id)
  end
end

local function enter_recipients(new)
  for _, one in ipairs(cjson.decode(new.recipients)) do
    local key = prefix .. 'events:' .. one.recipient
    if redis.call('EXISTS', key) == 0 then
      for _, event in ipairs(one.events) do redis.call('RPUSH', key, event) end
      if one.tries == '' then
        park(one.destination, one.recipient, retention_ms)
      else
        enqueue(one.destination, one.recipient)
        redis.call('HSET', prefix .. 'waiting', one.recipient, one.tries)
      end
    end
  end
end

local function enter(new)
  local key, place = prefix .. 'job:' .. new.job_id, place_of(new)
  local idempotency = new.idempotency ~= '' and prefix .. new.idempotency or ''
  redis.call('HSET', key, 'fingerprint', new.fingerprint, 'job', new.job, 'document', new.document,
             'attempt', new.attempt, 'revision', new.revision, 'idempotency', idempotency, 'route', new.route,
             'webhooks', new.webhooks, 'place', place)
  if new.tenant ~= '' then redis.call('HSET', key, 'tenant', new.tenant, 'share', new.share) end
  if place ~= '' then redis.call('ZADD', prefix .. place, score_of(new), new.job_id) end
  local owner = idempotency ~= '' and redis.call('GET', idempotency)
  if idempotency ~= '' and (not owner or redis.call('EXISTS', prefix .. 'job:' .. owner) == 0) then
    redis.call('SET', idempotency, new.job_id)
    owner = new.job_id
  end
  if is_final(place) then
    redis.call('PEXPIRE', key, new.ttl_ms)
    if owner == new.job_id then redis.call('PEXPIRE', idempotency, new.ttl_ms) end
  elseif owner == new.job_id then
    redis.call('PERSIST', idempotency)
  end
  local waits = new.status == 'queued' or new.status == 'retrying'
  if waits and new.expires_ms ~= '' then redis.call('ZADD', prefix .. 'expiring', new.expires_ms, new.job_id) end
  if new.status == 'running' and new.cancel == '1' then redis.call('SADD', prefix .. 'canceling', new.job_id) end
  if new.status == 'queued' then
    pcall(join_turns, new.route, new.tenant, new.job_id, tonumber(new.score) or now, tonumber(new.share) or 1)
  end
  enter_recipients(new)
  redis.pcall('PUBLISH', prefix .. 'changed:' .. new.job_id, new.revision)
end

local reply, entered = {}, {}
for _, new in ipairs(jobs) do
  local held = redis.call('HMGET', prefix .. 'job:' .. new.job_id, 'attempt', 'revision', 'place', 'document',
                          'fingerprint')
  local outcome = decide(new, held)
  reply[#reply + 1] = outcome
  if not dry and (outcome == 'added' or outcome == 'updated') then
    if held[1] then leave_place(new, held) end
    enter(new)
    entered[#entered + 1] = new
  end
end
pcall(list_new_jobs, entered, retention_ms)
return reply
