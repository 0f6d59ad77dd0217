-- Returns the live workers: worker, health, worker, health, and so on. Workers that are gone are removed.
local prefix = ARGV[1]
local worker_ttl_ms = tonumber(ARGV[2])

-- include: clock

local reply = {}
local workers = redis.call('HGETALL', prefix .. 'workers')
for index = 1, #workers, 2 do
  local renewed, health = string.match(workers[index + 1], '^(%d+) (.*)$')
  if tonumber(renewed) > now - worker_ttl_ms then
    reply[#reply + 1] = workers[index]
    reply[#reply + 1] = health
  else
    redis.pcall('HDEL', prefix .. 'workers', workers[index]) -- pcall: without permission it stays
  end
end
return reply
