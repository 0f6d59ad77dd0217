-- The facts and shards of a backfill and whether somebody runs it; {} where none is remembered.
local prefix = ARGV[1]
local output = ARGV[2]
local fresh_ms = tonumber(ARGV[3])
local cancel = ARGV[4] == '1' -- whoever runs it shall end it

-- include: clock

local key = prefix .. 'backfill:' .. output
local held = redis.call('HMGET', key, 'facts', 'shards', 'beat')
if not held[1] then return {} end
local lives = now - tonumber(held[3]) < fresh_ms
if cancel and lives then redis.call('HSET', key, 'cancel', '1') end
return {held[1], held[2], lives and 1 or 0}
