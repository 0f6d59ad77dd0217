-- now: the server's time in milliseconds, so that the clocks of workers do not matter.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- Format a whole number: Lua's default for a large one is 1.7e+12.
local function whole(number) return string.format('%.0f', number) end
