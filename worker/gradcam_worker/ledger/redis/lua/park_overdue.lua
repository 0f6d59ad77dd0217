-- Park the recipients of a destination that are due and have waited too long. Returns their number.
local prefix = ARGV[1]
local destination = ARGV[2]
local waited_ms = tonumber(ARGV[3])
local retention_ms = tonumber(ARGV[4])
local limit = ARGV[5] -- recipients that are checked

-- include: clock
-- include: parking

local parked = 0
local due = redis.call('ZRANGEBYSCORE', prefix .. 'lane:' .. destination, '-inf', now, 'LIMIT', 0, limit)
for _, recipient in ipairs(due) do
  local since = string.match(redis.call('HGET', prefix .. 'waiting', recipient) or '', '%d+$')
  if since and tonumber(since) <= now - waited_ms then
    park(destination, recipient, retention_ms)
    parked = parked + 1
  end
end
reschedule(destination)
return parked
