-- The lists of jobs: see "The lists" in ledger/redis/__init__.py. They are made from the jobs' records, so a
-- user without permission for them must still be able to change jobs: called by pcall.

local function list_scopes(tenant) return tenant == '' and {''} or {'', tenant} end

-- Enter a job in a list. The two oldest of the list are removed if their records are gone: so a list is not
-- longer than there are records, and one that no job enters any more expires.
local function list_job(scope, name, created_us, job_id, retention_ms)
  local key = prefix .. 'listed:' .. scope .. ':' .. name
  redis.call('ZADD', key, created_us, job_id)
  redis.call('PEXPIRE', key, retention_ms + 2592000000) -- 30 days in which a job may wait
  local old_us = whole((now - retention_ms) * 1000)
  for _, old_id in ipairs(redis.call('ZRANGE', key, '-inf', old_us, 'BYSCORE', 'LIMIT', 0, 2)) do
    if redis.call('EXISTS', prefix .. 'job:' .. old_id) == 0 then redis.call('ZREM', key, old_id) end
  end
end

local function list_new_job(tenant, names, created_us, job_id, retention_ms)
  for _, scope in ipairs(list_scopes(tenant)) do
    for name in string.gmatch(names, '[^\n]+') do
      list_job(scope, name, created_us, job_id, retention_ms)
    end
  end
end

-- Move a job to the list of its new status. Those that clients of earlier versions entered are in no list yet.
local function relist_job(tenant, status_before, status, created_us, job_id, retention_ms)
  for _, scope in ipairs(list_scopes(tenant)) do
    redis.call('ZREM', prefix .. 'listed:' .. scope .. ':status:' .. status_before, job_id)
    list_job(scope, 'status:' .. status, created_us, job_id, retention_ms)
    list_job(scope, 'all', created_us, job_id, retention_ms)
  end
end
