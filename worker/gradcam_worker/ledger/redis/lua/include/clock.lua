-- now: the server's own time in milliseconds, so that no two workers' clocks have to agree.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- A whole number as text: by itself Lua would write a large one as 1.7e+12.
local function whole(number) return string.format('%.0f', number) end
