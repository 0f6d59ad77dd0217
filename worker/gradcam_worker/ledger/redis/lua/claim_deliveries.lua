-- Claim due deliveries, of the destination that has been due longest first. Returns for each: destination,
-- recipient, its first event, 'tries since' (failed tries, and when it was first due), now, the lease
-- token, and the job's tenant ('?' where the job is gone, and may have been a tenant's).
-- include: records
local prefix = ARGV[1]
local limit = tonumber(ARGV[2])
local others_limit = tonumber(ARGV[3]) -- of hosts that are not among the destinations; one for each
local lease_ms = tonumber(ARGV[4])
local retention_ms = tonumber(ARGV[5])
local destinations = records(6, 'destination', 'limit')

-- include: clock
-- include: parking

local lease_token = whole(now + lease_ms)
local limits = {}
for _, record in ipairs(destinations) do limits[record.destination] = tonumber(record.limit) end

local has_quiet_urls = redis.call('EXISTS', prefix .. 'gone', prefix .. 'later') > 0
if has_quiet_urls then
  for _, name in ipairs({'gone', 'later'}) do
    redis.call('ZREMRANGEBYSCORE', prefix .. name, '-inf', now)
  end
end

-- Whether the receiver accepts deliveries now. A recipient whose URL is disabled is parked.
local function is_wanted(destination, recipient, text)
  local webhook = has_quiet_urls and string.match(text, '^[^\n]*\n([^\n]+)\n')
  if not webhook then return true end
  local url = cjson.decode(webhook).url
  if redis.call('ZSCORE', prefix .. 'gone', url) then
    park(destination, recipient, retention_ms)
    return false
  end
  local quiet_until = redis.call('ZSCORE', prefix .. 'later', url)
  if quiet_until then redis.call('ZADD', prefix .. 'lane:' .. destination, quiet_until, recipient) end
  return not quiet_until
end

local deliveries = {}
local function claim(destination, max_claims)
  local claimed, key = 0, prefix .. 'lane:' .. destination
  for _, recipient in ipairs(redis.call('ZRANGEBYSCORE', key, '-inf', now, 'LIMIT', 0, max_claims + 100)) do
    if claimed == max_claims then break end
    local first = redis.call('LINDEX', prefix .. 'events:' .. recipient, 0)
    if not first then
      redis.call('ZREM', key, recipient)
      redis.call('HDEL', prefix .. 'waiting', recipient)
    elseif is_wanted(destination, recipient, first) then
      claimed = claimed + 1
      redis.call('ZADD', key, lease_token, recipient)
      local tried = redis.call('HGET', prefix .. 'waiting', recipient) or '0 ' .. whole(now)
      local job_id = string.match(recipient, '^[^:]*')
      local tenant, attempt = unpack(redis.call('HMGET', prefix .. 'job:' .. job_id, 'tenant', 'attempt'))
      tenant = tenant or attempt and '' or '?'
      deliveries[#deliveries + 1] = {destination, recipient, first, tried, whole(now), lease_token, tenant}
    end
  end
  return claimed
end

local chosen, due = {}, {}
local function choose(destination, score)
  if due[destination] or tonumber(score) > now then return end
  due[destination], chosen[#chosen + 1] = tonumber(score), destination
end

for destination, max_claims in pairs(limits) do
  local score = max_claims > 0 and redis.call('ZSCORE', prefix .. 'outbox', destination)
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
table.sort(chosen, function(first, second) return due[first] < due[second] end)

for _, destination in ipairs(chosen) do
  local failures = pause_of(destination)
  local max_claims = math.min(limits[destination] or others_limit, limit)
  if failures > 0 or not limits[destination] then max_claims = math.min(max_claims, 1) end
  if max_claims > 0 then
    local claimed = claim(destination, max_claims)
    if claimed > 0 and failures > 0 then set_pause(destination, failures, lease_token) end
    if not limits[destination] then others_limit = others_limit - claimed end
    limit = limit - claimed
    reschedule(destination)
  end
end
return deliveries
