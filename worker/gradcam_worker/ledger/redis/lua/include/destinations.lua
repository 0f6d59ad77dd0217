-- The outbox's destinations: see "The outbox" in ledger/redis/__init__.py.

-- Returns a destination's failures in a row, and when its pause ends.
local function pause_of(destination)
  local pause = redis.call('HGET', prefix .. 'down', destination)
  local failures, ends = string.match(pause or '0 0', '^(%d+) (%d+)$')
  return tonumber(failures), tonumber(ends)
end

local function set_pause(destination, failures, ends)
  redis.call('HSET', prefix .. 'down', destination, whole(failures) .. ' ' .. whole(ends))
end

-- Set when the next delivery to a destination is due. A destination without recipients is removed.
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

-- Make a recipient with events due now, unless it is in the queue of its destination already.
local function enqueue(destination, recipient)
  if redis.call('ZADD', prefix .. 'lane:' .. destination, 'NX', now, recipient) == 0 then return end
  redis.call('PERSIST', prefix .. 'events:' .. recipient)
  redis.call('HSET', prefix .. 'waiting', recipient, '0 ' .. whole(now))
  reschedule(destination)
end
