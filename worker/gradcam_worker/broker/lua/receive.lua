-- Forget the messages that were acknowledged meanwhile. Then take the last item of the first list that has one,
-- and note it as unacknowledged in the same step. Returns which list it was and the item; nil where all are
-- empty. It is written first and popped then: where there is no memory to note it, it stays where it is.
local unacked = KEYS[1]
local unacked_index = KEYS[2]
local lists = {unpack(KEYS, 3)} -- in the order in which they are looked at
local delivery_tag = ARGV[1]
local received_s = ARGV[2]
local acknowledged = ARGV[3] -- delivery tags, with spaces between
local queues = {unpack(ARGV, 4)} -- the queue of each list, as JSON

for tag in string.gmatch(acknowledged, '%S+') do
  redis.call('ZREM', unacked_index, tag)
  redis.call('HDEL', unacked, tag)
end

for index, list in ipairs(lists) do
  local item = redis.call('LINDEX', list, -1)
  if item then
    redis.call('HSET', unacked, delivery_tag, '[' .. item .. ', "", ' .. queues[index] .. ']')
    redis.call('ZADD', unacked_index, received_s, delivery_tag)
    redis.call('RPOP', list)
    return {index, item}
  end
end
return false
