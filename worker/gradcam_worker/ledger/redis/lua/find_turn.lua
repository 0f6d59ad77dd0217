-- Returns the queued job whose turn it is in a route, as fingerprint, job, document, route and tenant; nothing
-- where no tenant waits. For a message whose own job is not queued any more.
local prefix = ARGV[1]
local route = ARGV[2]

-- include: clock
-- include: turns

local job_id = choose_job(route)
return job_id and describe_job(job_id) or {}
