-- The workers that were heard of lately: worker, health, worker, health and so on.
local prefix = ARGV[1]
local remembered_ms = tonumber(ARGV[2])

-- include: clock

local found = {}
local workers = redis.call('HGETALL', prefix .. 'workers')
for index = 1, #workers, 2 do
  local seen, health = string.match(workers[index + 1], '^(%d+) (.*)$')
  if tonumber(seen) > now - remembered_ms then
    found[#found + 1] = workers[index]
    found[#found + 1] = health
  else
    redis.pcall('HDEL', prefix .. 'workers', workers[index]) -- not every user may
  end
end
return found
