-- include: destinations

-- Park a recipient: nothing is delivered to it until it is replayed.
local function park(destination, recipient, retention_ms)
  redis.call('ZREM', prefix .. 'lane:' .. destination, recipient)
  redis.call('HDEL', prefix .. 'waiting', recipient)
  redis.call('ZADD', prefix .. 'parked', now, recipient .. ' ' .. destination)
  redis.call('PEXPIRE', prefix .. 'events:' .. recipient, retention_ms)
end

-- Whether the claim with this token is still valid.
local function is_claimed(destination, recipient, lease_token)
  local score = redis.call('ZSCORE', prefix .. 'lane:' .. destination, recipient)
  return score and tonumber(score) == tonumber(lease_token)
end
