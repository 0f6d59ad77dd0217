-- Count a job of a tenant that has ended, and its time on the device, for the day by the server's time. Called
-- by pcall: a user without permission for the counter must still be able to end jobs.
local function count_usage(tenant, device_us)
  local key = prefix .. 'usage:' .. tenant .. ':' .. whole(math.floor(now / 86400000))
  redis.call('HINCRBY', key, 'jobs', 1)
  redis.call('HINCRBY', key, 'device_us', device_us)
  redis.call('PEXPIRE', key, 34560000000) -- 400 days
end
