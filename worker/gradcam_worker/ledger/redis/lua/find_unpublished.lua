-- Returns ids of queued jobs whose message must have been lost. A job that was found is found again only
-- after a pause, which doubles each time: its message may only be slow. A job whose message was used for
-- another is found where the queue is empty: any other message there is used for it.
local prefix = ARGV[1]
local route = ARGV[2]
local queue_is_empty = ARGV[3] == '1'
local lost_after_ms = tonumber(ARGV[4])
local limit = ARGV[5]
local longest_pause_ms = tonumber(ARGV[6])

-- include: clock
-- include: turns

choose_job(route) -- which removes jobs that are not queued any more
local queued = prefix .. 'queued:' .. route
local newest = queue_is_empty and now or tonumber(redis.call('HGET', prefix .. 'claimed', route) or 0)
local job_ids = {}
for _, job_id in ipairs(redis.call('ZRANGEBYSCORE', queued, '-inf', math.min(newest, now) - lost_after_ms,
                                   'LIMIT', 0, limit)) do
  if redis.call('EXISTS', prefix .. 'job:' .. job_id) == 0 then
    redis.call('ZREM', queued, job_id)
  elseif not queue_is_empty and is_passed_over(route, job_id) then
    redis.call('ZADD', queued, now, job_id)
  else
    table.insert(job_ids, job_id)
    local published = redis.call('HINCRBY', prefix .. 'job:' .. job_id, 'rung', 1)
    local pause_ms = math.min(lost_after_ms * 2 ^ (published - 1), longest_pause_ms)
    redis.call('ZADD', queued, now + pause_ms - lost_after_ms, job_id)
  end
end
return job_ids
