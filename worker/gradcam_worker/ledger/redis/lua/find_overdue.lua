-- Ids of jobs whose lease has run out, whose pause is over, and whose time to expire has passed.
local prefix = ARGV[1]
local limit = ARGV[2] -- of each kind

-- include: clock

local found = {}
for index, name in ipairs({'running', 'retrying', 'expiring'}) do
  found[index] = {}
  for _, job_id in ipairs(redis.call('ZRANGEBYSCORE', prefix .. name, '-inf', now, 'LIMIT', 0, limit)) do
    if redis.call('EXISTS', prefix .. 'job:' .. job_id) == 1 then table.insert(found[index], job_id)
    else redis.call('ZREM', prefix .. name, job_id) end
  end
end
return found
