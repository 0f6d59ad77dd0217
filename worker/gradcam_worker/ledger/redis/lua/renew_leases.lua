-- Renew a worker's leases. Returns the ids of those jobs that it has lost, and of all running jobs to cancel.
-- include: records
local prefix = ARGV[1]
local lease_ms = tonumber(ARGV[2])
local worker = ARGV[3]
local health = ARGV[4]
local leases = records(5, 'job_id', 'attempt')

-- include: clock

redis.call('HSET', prefix .. 'workers', worker, whole(now) .. ' ' .. health)
local lost = {}
for _, lease in ipairs(leases) do
  local held = redis.call('HMGET', prefix .. 'job:' .. lease.job_id, 'attempt', 'place')
  if held[1] == lease.attempt and held[2] == 'running' then
    redis.call('ZADD', prefix .. 'running', now + lease_ms, lease.job_id)
  else
    lost[#lost + 1] = lease.job_id
  end
end
return {lost, redis.call('SMEMBERS', prefix .. 'canceling')}
