-- A backfill runs: say so. Returns whether the output is this owner's, how many backfills run, whether this
-- one is to end, the facts and shards that were held before, and the token that holds from now on: the same
-- backfill's of before, where there is one.
local prefix = ARGV[1]
local output = ARGV[2]
local owner = ARGV[3]
local facts = ARGV[4]
local shards = ARGV[5]
local fresh_ms = tonumber(ARGV[6])
local remembered_ms = ARGV[7]
local enter = ARGV[8] == '1' -- as the first step of a run
local new_token = ARGV[9]

-- include: clock

local key = prefix .. 'backfill:' .. output
local held_owner, renewed, held_facts, held_shards, cancel, token =
  unpack(redis.call('HMGET', key, 'owner', 'beat', 'facts', 'shards', 'cancel', 'token'))
local lives = renewed and now - tonumber(renewed) < fresh_ms
if held_owner and held_owner ~= owner and (lives or not enter) then
  return {0, 0, 0, held_facts, held_shards, ''}
end
if enter then
  local same = token and cjson.decode(held_facts).backfill == cjson.decode(facts).backfill
  if same then new_token = token end
  redis.call('HDEL', key, 'cancel')
  cancel = false
end
redis.call('HSET', key, 'owner', owner, 'beat', whole(now), 'facts', facts, 'shards', shards,
           'token', new_token)
redis.call('PEXPIRE', key, remembered_ms)
redis.call('ZADD', prefix .. 'backfills', whole(now), output)
redis.call('ZREMRANGEBYSCORE', prefix .. 'backfills', '-inf', whole(now - fresh_ms))
return {1, redis.call('ZCARD', prefix .. 'backfills'), cancel and 1 or 0, held_facts or '', held_shards or '',
        new_token}
