-- Remove dead letters and parked recipients whose retention is over.
local prefix = ARGV[1]
local retention_ms = tonumber(ARGV[2])

-- include: clock

for _, name in ipairs({'dead', 'parked'}) do
  redis.call('ZREMRANGEBYSCORE', prefix .. name, '-inf', now - retention_ms)
end
return 1
