-- Returns the documents of jobs that are in all of some lists, newest first: the score and the id of the last
-- job that was looked at, '1' if there are more, then the documents. The shortest list is searched.
local prefix = ARGV[1]
local scope = ARGV[2] -- a tenant; '': all jobs
local is_nobodys = ARGV[3] == '1' -- only jobs of no tenant
local limit = tonumber(ARGV[4])
local max_scanned = ARGV[5]
local newest_us = ARGV[6] -- or +inf
local oldest_us = ARGV[7] -- or -inf
local before_id = ARGV[8] -- only jobs before this one, of those with the score newest_us
local names = {unpack(ARGV, 9)}

local shortest, length
for _, name in ipairs(names) do
  local size = redis.call('ZCARD', prefix .. 'listed:' .. scope .. ':' .. name)
  if not length or size < length then shortest, length = name, size end
end

local function is_in_others(job_id)
  for _, name in ipairs(names) do
    local key = prefix .. 'listed:' .. scope .. ':' .. name
    if name ~= shortest and not redis.call('ZSCORE', key, job_id) then return false end
  end
  return true
end

local key = prefix .. 'listed:' .. scope .. ':' .. shortest
local found = redis.call('ZRANGE', key, newest_us, oldest_us, 'BYSCORE', 'REV', 'LIMIT', 0, max_scanned, 'WITHSCORES')
local reply = {'', '', #found / 2 == tonumber(max_scanned) and '1' or ''}
for index = 1, #found, 2 do
  local job_id, score = found[index], found[index + 1]
  if not (before_id ~= '' and score == newest_us and job_id >= before_id) then
    if #reply == limit + 3 then
      reply[3] = '1'
      break
    end
    reply[1], reply[2] = score, job_id
    if is_in_others(job_id) then
      local document, tenant = unpack(redis.call('HMGET', prefix .. 'job:' .. job_id, 'document', 'tenant'))
      if not document then redis.call('ZREM', key, job_id)
      elseif not (is_nobodys and tenant) then reply[#reply + 1] = document end
    end
  end
end
return reply
