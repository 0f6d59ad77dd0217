-- Become or remain the worker that runs the reaper. Returns 0 if another worker is the leader.
local prefix = ARGV[1]
local worker = ARGV[2]
local lease_ms = ARGV[3]

local leader = redis.call('GET', prefix .. 'reaper')
if leader and leader ~= worker then return 0 end
redis.call('SET', prefix .. 'reaper', worker, 'PX', lease_ms)
return 1
