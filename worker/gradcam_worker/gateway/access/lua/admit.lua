-- Count requests and jobs of a tenant. Returns when the rate allows such requests, and when the quota allows jobs
-- again, in ms from now. 0 and 0: they are allowed; else nothing was counted.
local prefix = ARGV[1]
local tenant = ARGV[2]
local requests = tonumber(ARGV[3])
local interval_us = tonumber(ARGV[4]) -- between two requests at the allowed rate
local burst = tonumber(ARGV[5])
local jobs = tonumber(ARGV[6])
local jobs_per_day = tonumber(ARGV[7]) -- 0: no quota
local repeat_of = ARGV[8] -- digest of the idempotency key; empty: none
-- include: clock

local DAY_MS = 86400000
local now_us = time[1] * 1000000 + time[2]

-- The virtual scheduling algorithm (GCRA): each request moves the time at which all would have come.
local rate_key = prefix .. 'rate:' .. tenant
local due_us = math.max(tonumber(redis.call('GET', rate_key) or 0), now_us) + requests * interval_us
local early_us = due_us - now_us - burst * interval_us
if requests > 0 and early_us > 0 then return {math.ceil(early_us / 1000), 0} end

local day = math.floor(now / DAY_MS)
local rest_ms = (day + 1) * DAY_MS - now
local quota_key = prefix .. 'quota:' .. tenant .. ':' .. whole(day)
local repeats_key = prefix .. 'repeats:' .. tenant .. ':' .. whole(day)
local counts = jobs > 0 and jobs_per_day > 0
if counts and repeat_of ~= '' and redis.call('SISMEMBER', repeats_key, repeat_of) == 1 then counts = false end
if counts and tonumber(redis.call('GET', quota_key) or 0) + jobs > jobs_per_day then return {0, rest_ms} end

if requests > 0 then
  redis.call('SET', rate_key, whole(due_us), 'PX', whole(math.ceil((due_us - now_us) / 1000) + 1000))
end
if counts then
  redis.call('INCRBY', quota_key, jobs)
  redis.call('PEXPIRE', quota_key, whole(rest_ms + DAY_MS))
  if repeat_of ~= '' then
    redis.call('SADD', repeats_key, repeat_of)
    redis.call('PEXPIRE', repeats_key, whole(rest_ms + DAY_MS))
  end
end
return {0, 0}
