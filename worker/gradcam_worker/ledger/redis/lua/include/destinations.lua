-- The outbox's destinations: see "The outbox" in ledger/redis/__init__.py.

-- How often in a row this destination failed, and until when it is left alone.
local function pause_of(destination)
  local pause = redis.call('HGET', prefix .. 'down', destination)
  local failures, ends = string.match(pause or '0 0', '^(%d+) (%d+)$')
  return tonumber(failures), tonumber(ends)
end

local function set_pause(destination, failures, ends)
  redis.call('HSET', prefix .. 'down', destination, whole(failures) .. ' ' .. whole(ends))
end

-- Set when the next delivery to this destination may be tried; without recipients it is removed.
local function reschedule(destination)
  local first = redis.call('ZRANGE', prefix .. 'lane:' .. destination, 0, 0, 'WITHSCORES')
  if first[1] then
    local _, ends = pause_of(destination)
    redis.call('ZADD', prefix .. 'outbox', math.max(tonumber(first[2]), ends), destination)
  else
    redis.call('ZREM', prefix .. 'outbox', destination)
    redis.call('HDEL', prefix .. 'down', destination)
  end
end

-- A recipient with events is due now, unless it stands in line already.
local function enqueue(destination, recipient)
  if redis.call('ZADD', prefix .. 'lane:' .. destination, 'NX', now, recipient) == 0 then return end
  redis.call('PERSIST', prefix .. 'events:' .. recipient)
  redis.call('HSET', prefix .. 'waiting', recipient, '0 ' .. whole(now))
  reschedule(destination)
end
