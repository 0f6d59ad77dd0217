-- Returns ids of running jobs whose lease has expired, of retrying jobs whose pause is over, and of waiting
-- jobs that have expired.
local prefix = ARGV[1]
local limit = ARGV[2] -- of each kind

-- include: clock

local job_ids = {}
for index, name in ipairs({'running', 'retrying', 'expiring'}) do
  job_ids[index] = {}
  for _, job_id in ipairs(redis.call('ZRANGEBYSCORE', prefix .. name, '-inf', now, 'LIMIT', 0, limit)) do
    if redis.call('EXISTS', prefix .. 'job:' .. job_id) == 1 then table.insert(job_ids[index], job_id)
    else redis.call('ZREM', prefix .. name, job_id) end
  end
end
return job_ids
