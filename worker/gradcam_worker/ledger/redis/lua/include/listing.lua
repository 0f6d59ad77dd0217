-- The lists of jobs: see "The lists" in ledger/redis/__init__.py. They are made from the jobs' records, so a
-- user without permission for them must still be able to change jobs: called by pcall.

local function list_scopes(tenant) return tenant == '' and {''} or {'', tenant} end

local function list_key(scope, name) return prefix .. 'listed:' .. scope .. ':' .. name end

local TIDY_EACH = 32 -- jobs that enter a list: it costs more than to enter one

-- Enter jobs in a list; scored: created_us, job_id, and so on. Now and then the oldest of it are removed if
-- their records are gone, twice as many as have come: so a list is not longer than there are records. One that
-- no job enters any more expires.
local function list_jobs(key, scored, retention_ms)
  redis.call('ZADD', key, unpack(scored))
  redis.call('PEXPIRE', key, retention_ms + 604800000) -- a week in which a job may wait
  if #scored == 2 and redis.call('ZCARD', key) % TIDY_EACH ~= 1 then return end
  local old_us = whole((now - retention_ms) * 1000)
  for _, old_id in ipairs(redis.call('ZRANGE', key, '-inf', old_us, 'BYSCORE', 'LIMIT', 0, #scored + 2 * TIDY_EACH)) do
    if redis.call('EXISTS', prefix .. 'job:' .. old_id) == 0 then redis.call('ZREM', key, old_id) end
  end
end

-- Enter new jobs in their lists, each list once.
local function list_new_jobs(jobs, retention_ms)
  local lists = {}
  for _, job in ipairs(jobs) do
    for _, scope in ipairs(list_scopes(job.tenant)) do
      for name in string.gmatch(job.lists, '[^\n]+') do
        local key = list_key(scope, name)
        lists[key] = lists[key] or {}
        table.insert(lists[key], job.created_us)
        table.insert(lists[key], job.job_id)
      end
    end
  end
  for key, scored in pairs(lists) do list_jobs(key, scored, retention_ms) end
end

-- Move a job to the list of its new status. Those that clients of earlier versions entered are in no list yet.
local function relist_job(tenant, status_before, status, created_us, job_id, retention_ms)
  for _, scope in ipairs(list_scopes(tenant)) do
    local was_listed = redis.call('ZREM', list_key(scope, 'status:' .. status_before), job_id)
    local scored = {created_us, job_id}
    list_jobs(list_key(scope, 'status:' .. status), scored, retention_ms)
    if was_listed == 0 then list_jobs(list_key(scope, 'all'), scored, retention_ms) end
  end
end
