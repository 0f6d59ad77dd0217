-- Park a claimed recipient: nothing is delivered until it is replayed. Returns 0 if another dispatcher has
-- claimed it.
local prefix = ARGV[1]
local destination = ARGV[2]
local recipient = ARGV[3]
local lease_token = tonumber(ARGV[4])
local retention_ms = tonumber(ARGV[5])

-- include: clock
-- include: parking

if not is_claimed(destination, recipient, lease_token) then return 0 end
park(destination, recipient, retention_ms)
local failures, ends = pause_of(destination)
if ends == lease_token then set_pause(destination, failures, now) end
reschedule(destination)
return 1
