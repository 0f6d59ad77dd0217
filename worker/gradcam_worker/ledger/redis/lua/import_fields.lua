-- Enter exported fields of a hash. Returns how many were entered, or would be if not `dry`. With `greatest`, the
-- numbers that are greater than the hash's; else all, but only if there is no such hash.
local prefix = ARGV[1]
local name = ARGV[2]
local dry = ARGV[3] == '1'
local greatest = ARGV[4] == '1'
local ttl_ms = tonumber(ARGV[5]) -- nil: it stays
-- include: records
local exported = records(6, 'field', 'value')

local key, entered = prefix .. name, 0
if not greatest and redis.call('EXISTS', key) == 1 then return 0 end
for _, one in ipairs(exported) do
  local held = greatest and tonumber(redis.call('HGET', key, one.field) or -1)
  if not held or held < tonumber(one.value) then
    entered = entered + 1
    if not dry then redis.call('HSET', key, one.field, one.value) end
  end
end
if ttl_ms and entered > 0 and not dry then redis.call('PEXPIRE', key, ttl_ms) end
return entered
