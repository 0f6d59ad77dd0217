-- How much waits: retrying, running, dead, recipients, age of the oldest event (ms), workers, then for each
-- route how many are queued and the age of the oldest (ms). The age of what does not exist is 0.
local prefix = ARGV[1]
local remembered_ms = tonumber(ARGV[2]) -- of workers
local scanned = ARGV[3] -- recipients whose events are searched for the oldest
local routes = {unpack(ARGV, 4)}

-- include: clock

local function age(since) return math.max(now - tonumber(since or now), 0) end

local workers = 0
for _, worker in ipairs(redis.call('HVALS', prefix .. 'workers')) do
  if tonumber(string.match(worker, '^%d+')) > now - remembered_ms then workers = workers + 1 end
end

local oldest = now
local waiting = redis.call('HSCAN', prefix .. 'waiting', 0, 'COUNT', scanned)[2]
for index = 2, #waiting, 2 do
  oldest = math.min(oldest, tonumber(string.match(waiting[index], '%d+$')))
end

local found = {}
for _, name in ipairs({'retrying', 'running', 'dead'}) do
  found[#found + 1] = redis.call('ZCARD', prefix .. name)
end
found[#found + 1] = redis.call('HLEN', prefix .. 'waiting')
found[#found + 1] = age(oldest)
found[#found + 1] = workers
for _, route in ipairs(routes) do
  local key = prefix .. 'queued:' .. route
  found[#found + 1] = redis.call('ZCARD', key)
  found[#found + 1] = age(redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')[2])
end
return found
