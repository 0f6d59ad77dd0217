-- Read all that the ledger holds of each job, at one moment. Returns for each: how long it is kept, in ms (-1: as
-- long as it is not final; -2: there is no such job), its score in the sorted set of its place, whether it is in
-- the list of all jobs, the fields of its hash, and its recipients: of each its name, tries, and events.
local prefix = ARGV[1]
local job_ids = {unpack(ARGV, 2)}

local MAX_WEBHOOKS = 4

local function add_recipient(recipients, recipient)
  local events = redis.call('LRANGE', prefix .. 'events:' .. recipient, 0, -1)
  if #events == 0 then return end
  recipients[#recipients + 1] = {recipient, redis.call('HGET', prefix .. 'waiting', recipient) or '', events}
end

local sinks, reply = redis.call('SMEMBERS', prefix .. 'sinks'), {}
for _, job_id in ipairs(job_ids) do
  local key, recipients = prefix .. 'job:' .. job_id, {}
  local place = redis.call('HGET', key, 'place') or ''
  for index = 1, MAX_WEBHOOKS do add_recipient(recipients, job_id .. ':hook' .. index) end
  for _, sink in ipairs(sinks) do add_recipient(recipients, job_id .. ':' .. sink) end
  reply[#reply + 1] = {
    redis.call('PTTL', key),
    place ~= '' and redis.call('ZSCORE', prefix .. place, job_id) or '',
    redis.call('ZSCORE', prefix .. 'listed::all', job_id) and 1 or 0,
    redis.call('HGETALL', key),
    recipients
  }
end
return reply
