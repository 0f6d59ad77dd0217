-- A job has ended: it, and its idempotency key, live on for the time that results are kept. That it ended
-- is counted for `gradcam top`, by pcall: who may not write there must be able to end jobs all the same.
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
