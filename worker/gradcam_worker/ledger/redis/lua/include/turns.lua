-- The turns of the tenants that wait in a route: see "The turns" in ledger/redis/__init__.py.

local PASSED_OVER = 10000000000000 -- subtracted from the place of a job whose message was used for another

local HEAD_START = 32 -- turns of a tenant that has waited for none lately: a pass or two, not a backlog

local function turn_key(route, tenant) return prefix .. 'turn:' .. route .. ':' .. tenant end

-- Whether a tenant has a job that waits in this route, so that a claim must ask whose turn it is.
local function has_turns(route)
  return route ~= 'shard' and redis.call('EXISTS', prefix .. 'turns:' .. route) == 1
end

-- Let a queued job wait for its tenant's turn. A tenant that comes begins a head start before the present, but
-- not before what it has had: so it gains no more than that by having waited for no turn.
local function join_turns(route, tenant, job_id, queued_at, share)
  local turns, rested = prefix .. 'turns:' .. route, prefix .. 'rested:' .. route
  if route == 'shard' or tenant == '' and redis.call('EXISTS', turns) == 0 then return end
  redis.call('ZADD', turn_key(route, tenant), queued_at, job_id)
  if redis.call('ZSCORE', turns, tenant) then return end
  local start = tonumber(redis.call('ZSCORE', rested, ':present') or 0) - HEAD_START / share
  local had = tonumber(redis.call('ZSCORE', rested, tenant) or start)
  redis.call('ZADD', turns, math.max(start, had), tenant)
  redis.call('ZREM', rested, tenant)
end

-- Remove a job that is not queued any more. A claim has a cost: the tenant's next turn is as much later.
local function leave_turns(route, tenant, job_id, cost)
  if not has_turns(route) then return end
  local turns, rested = prefix .. 'turns:' .. route, prefix .. 'rested:' .. route
  redis.call('ZREM', turn_key(route, tenant), job_id)
  local time = redis.call('ZSCORE', turns, tenant)
  if not time then return end
  time = tonumber(time)
  if cost > 0 and time > 0 then redis.call('ZADD', rested, 'GT', time, ':present') end
  time = time + cost
  if redis.call('ZCARD', turn_key(route, tenant)) > 0 then
    if cost > 0 then redis.call('ZADD', turns, time, tenant) end
    return
  end
  redis.call('ZREM', turns, tenant)
  if redis.call('EXISTS', turns) == 0 then
    redis.call('DEL', rested)
    return
  end
  redis.call('ZADD', rested, time, tenant)
end

-- Choose the queued job to claim with the message of a job, or with one whose job is not queued (own_id: nil).
-- Jobs that workers of earlier versions have claimed are removed on the way.
local function choose_job(route, own_tenant, own_id)
  if not has_turns(route) then return own_id end
  if own_id and not redis.call('ZSCORE', turn_key(route, own_tenant), own_id) then
    local queued_at = redis.call('ZSCORE', prefix .. 'queued:' .. route, own_id)
    local share = tonumber(redis.call('HGET', prefix .. 'job:' .. own_id, 'share') or 1)
    join_turns(route, own_tenant, own_id, queued_at or now, share)
  end
  for _ = 1, 500 do
    local tenant = redis.call('ZRANGE', prefix .. 'turns:' .. route, 0, 0)[1]
    if not tenant then return own_id end
    local first_id, place = unpack(redis.call('ZRANGE', turn_key(route, tenant), 0, 0, 'WITHSCORES'))
    if own_id and tenant == own_tenant and tonumber(place or 0) >= 0 then return own_id end
    if first_id and redis.call('HGET', prefix .. 'job:' .. first_id, 'place') == 'queued:' .. route then
      return first_id
    end
    leave_turns(route, tenant, first_id or '', 0)
  end
  return own_id
end

-- The message of a queued job is used for another: the next turn of its tenant is for this job.
local function pass_over(route, tenant, job_id)
  local place = tonumber(redis.call('ZSCORE', turn_key(route, tenant), job_id) or now)
  if place >= 0 then redis.call('ZADD', turn_key(route, tenant), place - PASSED_OVER, job_id) end
end

local function is_passed_over(route, job_id)
  if not has_turns(route) then return false end
  local tenant = redis.call('HGET', prefix .. 'job:' .. job_id, 'tenant') or ''
  return tonumber(redis.call('ZSCORE', turn_key(route, tenant), job_id) or 0) < 0
end

local function describe_job(job_id)
  local fields = redis.call('HMGET', prefix .. 'job:' .. job_id, 'fingerprint', 'job', 'document', 'route', 'tenant')
  fields[5] = fields[5] or ''
  return fields
end
