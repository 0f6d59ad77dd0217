-- A delivery failed and is due again after a while; from the second failure in a row on its destination is
-- left alone for a while too.
local prefix = ARGV[1]
local destination = ARGV[2]
local recipient = ARGV[3]
local lease_token = tonumber(ARGV[4])
local delay_ms = tonumber(ARGV[5])
local first_pause_ms = tonumber(ARGV[6]) -- of a destination
local longest_pause_ms = tonumber(ARGV[7])
local url = ARGV[8] -- '': no webhook
local quiet_ms = tonumber(ARGV[9]) -- that this URL wants to hear nothing

-- include: clock
-- include: parking

if not is_claimed(destination, recipient, lease_token) then return 0 end
local tried = redis.call('HGET', prefix .. 'waiting', recipient) or '0 0'
local tries, since = string.match(tried, '^(%d+) (%d+)$')
redis.call('HSET', prefix .. 'waiting', recipient, whole(tries + 1) .. ' ' .. since)
redis.call('ZADD', prefix .. 'lane:' .. destination, now + delay_ms, recipient)
-- What fails while the destination is left alone was on its way before, and says nothing new.
local failures, ends = pause_of(destination)
if now >= ends or ends == lease_token then
  local doubled_ms = first_pause_ms * 2 ^ math.min(failures - 1, 20)
  local pause_ms = failures > 0 and math.min(doubled_ms, longest_pause_ms) or 0
  set_pause(destination, failures + 1, now + pause_ms)
end
if quiet_ms > 0 then redis.call('ZADD', prefix .. 'later', now + quiet_ms, url) end
reschedule(destination)
return 1
