-- A job is final: set the time to live of its keys, and count it for `gradcam top`. By pcall: a user without
-- permission for the counter must still be able to end jobs.
local function begin_retention(job_id, idempotency, retention_ms, keyed_retention_ms, route, status)
  local key = prefix .. 'ended:' .. whole(math.floor(now / 60000))
  if redis.pcall('HINCRBY', key, route .. ' ' .. status, 1) == 1 then redis.pcall('PEXPIRE', key, 900000) end
  local ttl_ms = retention_ms
  if idempotency and idempotency ~= '' then
    ttl_ms = math.max(ttl_ms, keyed_retention_ms)
    redis.call('PEXPIRE', idempotency, ttl_ms)
  end
  redis.call('PEXPIRE', prefix .. 'job:' .. job_id, ttl_ms)
end
