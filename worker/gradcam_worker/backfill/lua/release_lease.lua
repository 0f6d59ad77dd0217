-- Nobody runs this backfill any more. Returns whether it was this owner's.
local prefix = ARGV[1]
local output = ARGV[2]
local owner = ARGV[3]
local facts = ARGV[4]
local shards = ARGV[5]

local key = prefix .. 'backfill:' .. output
if redis.call('HGET', key, 'owner') ~= owner then return 0 end
redis.call('HSET', key, 'owner', '', 'beat', '0', 'facts', facts, 'shards', shards)
redis.call('ZREM', prefix .. 'backfills', output)
return 1
