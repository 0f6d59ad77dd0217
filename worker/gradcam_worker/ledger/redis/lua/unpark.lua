-- Queue a parked recipient again. Returns 0 if it has nothing to deliver.
local prefix = ARGV[1]
local destination = ARGV[2]
local recipient = ARGV[3]

-- include: clock
-- include: destinations

if redis.call('ZREM', prefix .. 'parked', recipient .. ' ' .. destination) == 0 then return 0 end
if redis.call('EXISTS', prefix .. 'events:' .. recipient) == 0 then return 0 end
enqueue(destination, recipient)
return 1
