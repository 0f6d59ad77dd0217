-- Repeat a failed delivery after a delay. From the second failure in a row its destination is paused too.
-- Returns 0 if another dispatcher has claimed it.
local prefix = ARGV[1]
local destination = ARGV[2]
local recipient = ARGV[3]
local lease_token = tonumber(ARGV[4])
local delay_ms = tonumber(ARGV[5])
local first_pause_ms = tonumber(ARGV[6]) -- of the destination
local longest_pause_ms = tonumber(ARGV[7])
local url = ARGV[8] -- '': the recipient is a sink
local quiet_ms = tonumber(ARGV[9]) -- the time during which nothing is delivered to the URL

-- include: clock
-- include: parking

if not is_claimed(destination, recipient, lease_token) then return 0 end
local tried = redis.call('HGET', prefix .. 'waiting', recipient) or '0 0'
local tries, since = string.match(tried, '^(%d+) (%d+)$')
redis.call('HSET', prefix .. 'waiting', recipient, whole(tries + 1) .. ' ' .. since)
redis.call('ZADD', prefix .. 'lane:' .. destination, now + delay_ms, recipient)
-- A delivery that fails during the pause was claimed before it: only the probe counts.
local failures, ends = pause_of(destination)
if now >= ends or ends == lease_token then
  local doubled_ms = first_pause_ms * 2 ^ math.min(failures - 1, 20)
  local pause_ms = failures > 0 and math.min(doubled_ms, longest_pause_ms) or 0
  set_pause(destination, failures + 1, now + pause_ms)
end
if quiet_ms > 0 then redis.call('ZADD', prefix .. 'later', now + quiet_ms, url) end
reschedule(destination)
return 1
