-- Stop deliveries to a URL.
local prefix = ARGV[1]
local url = ARGV[2]
local disabled_ms = tonumber(ARGV[3])

-- include: clock

redis.call('ZREMRANGEBYSCORE', prefix .. 'gone', '-inf', now)
redis.call('ZADD', prefix .. 'gone', now + disabled_ms, url)
return 1
