-- Returns the numbers of retrying jobs, running jobs, dead letters and recipients, the age of the oldest
-- event (ms), the number of workers, then for each route the number of queued jobs and the age of the oldest
-- (ms). Without an event or a job its age is 0.
local prefix = ARGV[1]
local worker_ttl_ms = tonumber(ARGV[2])
local max_scanned = ARGV[3] -- recipients that are searched for the oldest event
local routes = {unpack(ARGV, 4)}

-- include: clock

local function age(since) return math.max(now - tonumber(since or now), 0) end

local workers = 0
for _, worker in ipairs(redis.call('HVALS', prefix .. 'workers')) do
  if tonumber(string.match(worker, '^%d+')) > now - worker_ttl_ms then workers = workers + 1 end
end

local oldest = now
local waiting = redis.call('HSCAN', prefix .. 'waiting', 0, 'COUNT', max_scanned)[2]
for index = 2, #waiting, 2 do
  oldest = math.min(oldest, tonumber(string.match(waiting[index], '%d+$')))
end

local reply = {}
for _, name in ipairs({'retrying', 'running', 'dead'}) do
  reply[#reply + 1] = redis.call('ZCARD', prefix .. name)
end
reply[#reply + 1] = redis.call('HLEN', prefix .. 'waiting')
reply[#reply + 1] = age(oldest)
reply[#reply + 1] = workers
for _, route in ipairs(routes) do
  local key = prefix .. 'queued:' .. route
  reply[#reply + 1] = redis.call('ZCARD', key)
  reply[#reply + 1] = age(redis.call('ZRANGE', key, 0, 0, 'WITHSCORES')[2])
end
return reply
