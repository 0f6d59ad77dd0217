-- Claim deliveries that are due, the longest due destination first. Returns of each: destination, recipient,
-- its first event, 'tries since' (how often and since when it could be tried), now, and the lease token.
-- include: records
local prefix = ARGV[1]
local limit = tonumber(ARGV[2])
local others_limit = tonumber(ARGV[3]) -- of hosts that are not among the destinations, one each
local lease_ms = tonumber(ARGV[4])
local retention_ms = tonumber(ARGV[5])
local destinations = records(6, 'destination', 'limit')

-- include: clock
-- include: parking

local lease_token = whole(now + lease_ms)
local limits = {}
for _, one in ipairs(destinations) do limits[one.destination] = tonumber(one.limit) end

local some_quiet = redis.call('EXISTS', prefix .. 'gone', prefix .. 'later') > 0
if some_quiet then
  for _, name in ipairs({'gone', 'later'}) do
    redis.call('ZREMRANGEBYSCORE', prefix .. name, '-inf', now)
  end
end

-- Whether the receiver has not said that it wants nothing, now or at all.
local function is_wanted(destination, recipient, text)
  local webhook = some_quiet and string.match(text, '^[^\n]*\n([^\n]+)\n')
  if not webhook then return true end
  local url = cjson.decode(webhook).url
  if redis.call('ZSCORE', prefix .. 'gone', url) then
    park(destination, recipient, retention_ms)
    return false
  end
  local later = redis.call('ZSCORE', prefix .. 'later', url)
  if later then redis.call('ZADD', prefix .. 'lane:' .. destination, later, recipient) end
  return not later
end

local found = {}
local function claim(destination, most)
  local claimed, key = 0, prefix .. 'lane:' .. destination
  for _, recipient in ipairs(redis.call('ZRANGEBYSCORE', key, '-inf', now, 'LIMIT', 0, most + 100)) do
    if claimed == most then break end
    local first = redis.call('LINDEX', prefix .. 'events:' .. recipient, 0)
    if not first then
      redis.call('ZREM', key, recipient)
      redis.call('HDEL', prefix .. 'waiting', recipient)
    elseif is_wanted(destination, recipient, first) then
      claimed = claimed + 1
      redis.call('ZADD', key, lease_token, recipient)
      local tried = redis.call('HGET', prefix .. 'waiting', recipient) or '0 ' .. whole(now)
      found[#found + 1] = {destination, recipient, first, tried, whole(now), lease_token}
    end
  end
  return claimed
end

local chosen, due = {}, {}
local function choose(destination, score)
  if due[destination] or tonumber(score) > now then return end
  due[destination], chosen[#chosen + 1] = tonumber(score), destination
end

for destination, most in pairs(limits) do
  local score = most > 0 and redis.call('ZSCORE', prefix .. 'outbox', destination)
  if score then choose(destination, score) end
end
if others_limit > 0 then
  local first = redis.call('ZRANGEBYSCORE', prefix .. 'outbox', '-inf', now, 'WITHSCORES', 'LIMIT', 0,
                           others_limit + #destinations + 20)
  for index = 1, #first, 2 do
    local destination = first[index]
    local is_host = string.sub(destination, 1, 2) == '//'
    if not limits[destination] and is_host then choose(destination, first[index + 1]) end
  end
end
table.sort(chosen, function(one, other) return due[one] < due[other] end)

for _, destination in ipairs(chosen) do
  local failures = pause_of(destination)
  local most = math.min(limits[destination] or others_limit, limit)
  if failures > 0 or not limits[destination] then most = math.min(most, 1) end
  if most > 0 then
    local claimed = claim(destination, most)
    if claimed > 0 and failures > 0 then set_pause(destination, failures, lease_token) end
    if not limits[destination] then others_limit = others_limit - claimed end
    limit = limit - claimed
    reschedule(destination)
  end
end
return found
