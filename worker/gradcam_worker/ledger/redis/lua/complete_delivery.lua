-- Remove a recipient's first event, which was delivered or is not to be: its next one is due. Returns 0 if
-- another dispatcher has claimed it.
local prefix = ARGV[1]
local destination = ARGV[2]
local recipient = ARGV[3]
local lease_token = ARGV[4]

-- include: clock
-- include: parking

local key = prefix .. 'events:' .. recipient
if not is_claimed(destination, recipient, lease_token) then return 0 end
redis.call('LPOP', key)
redis.call('ZREM', prefix .. 'lane:' .. destination, recipient)
redis.call('HDEL', prefix .. 'waiting', recipient)
redis.call('HDEL', prefix .. 'down', destination)
if redis.call('EXISTS', key) == 1 then enqueue(destination, recipient) else reschedule(destination) end
return 1
