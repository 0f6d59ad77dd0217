"""What happens in the outbox in Redis in one step: Lua, for `redis_outbox` and the ledger's `redis_scripts`.

Every key begins with a prefix P, the first argument. Times are the server's own, in milliseconds.

    events:<recipient>   a list of what a recipient is to be told, in order
    waiting              for each recipient, how often its first event was tried, and since when it could be
    lane:<lane>          a sorted set of recipients, by when each is to be told next. One a dispatcher has
                         stands there by when it is due again if that courier says no more: it is what the
                         courier holds it by
    outbox               a sorted set of lanes, by when something may be tried there
    down                 for each lane that failed the last time, how often in a row, and until when it is
                         left alone
    parked               who could not be told, by when it was given up
    gone, later          URLs that want to hear nothing, by until when
    sinks                who is told of every job

A recipient that is not parked stands in its lane exactly as long as it has events. Nothing of all this is
left when everything has been told.
"""

NOW = """
local P = ARGV[1]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function ms(number) return string.format('%.0f', number) end
"""

_LANES = """
local function down(lane)
  local said = redis.call('HGET', P .. 'down', lane)
  local failures, ends = string.match(said or '0 0', '^(%d+) (%d+)$')
  return tonumber(failures), tonumber(ends)
end

local function set_down(lane, failures, ends)
  redis.call('HSET', P .. 'down', lane, ms(failures) .. ' ' .. ms(ends))
end

local function settle(lane)
  local first = redis.call('ZRANGE', P .. 'lane:' .. lane, 0, 0, 'WITHSCORES')
  if first[1] then
    local _, ends = down(lane)
    redis.call('ZADD', P .. 'outbox', math.max(tonumber(first[2]), ends), lane)
  else
    redis.call('ZREM', P .. 'outbox', lane)
    redis.call('HDEL', P .. 'down', lane)
  end
end

local function enter(lane, recipient)
  if redis.call('ZADD', P .. 'lane:' .. lane, 'NX', now, recipient) == 0 then return end
  redis.call('PERSIST', P .. 'events:' .. recipient)
  redis.call('HSET', P .. 'waiting', recipient, '0 ' .. ms(now))
  settle(lane)
end
"""

# tell: put an event where those who are to hear of it are served
TELL = (
    _LANES
    + """
local function put(lane, recipient, text, retention)
  local key = P .. 'events:' .. recipient
  redis.call('RPUSH', key, text)
  if not redis.call('ZSCORE', P .. 'parked', recipient .. ' ' .. lane) then enter(lane, recipient)
  elseif redis.call('PTTL', key) == -1 then redis.call('PEXPIRE', key, retention) end
end

local function tell(id, hooks, event, document, retention)
  if event == '' then return end
  if hooks and hooks ~= '' then
    for index, hook in ipairs(cjson.decode(hooks)) do
      for _, wanted in ipairs(hook.events) do
        if wanted == event then
          put(hook.lane, id .. ':hook' .. index, event .. '\\n' .. hook.text .. '\\n' .. document, retention)
          break
        end
      end
    end
  end
  for _, sink in ipairs(redis.call('SMEMBERS', P .. 'sinks')) do
    put(sink, id .. ':' .. sink, event .. '\\n\\n' .. document, retention)
  end
end
"""
)

_PARKING = (
    _LANES
    + """
local function shelve(lane, recipient, retention)
  redis.call('ZREM', P .. 'lane:' .. lane, recipient)
  redis.call('HDEL', P .. 'waiting', recipient)
  redis.call('ZADD', P .. 'parked', now, recipient .. ' ' .. lane)
  redis.call('PEXPIRE', P .. 'events:' .. recipient, retention)
end

local function holds(lane, recipient, held)
  local score = redis.call('ZSCORE', P .. 'lane:' .. lane, recipient)
  return score and tonumber(score) == tonumber(held)
end
"""
)

# ARGV: P, how many, how many of hosts that are not named, for how long the others keep away (ms), retention
# (ms), then lane and how many of it, ... -> lane, recipient, its first event, how often and since when (ms)
# it was tried, now (ms), what it is held by (ms)
# Whoever wants to hear nothing is passed over.
TAKE = (
    NOW
    + _PARKING
    + """
local found, room, left, others = {}, {}, tonumber(ARGV[2]), tonumber(ARGV[3])
local held = ms(now + ARGV[4])
for index = 6, #ARGV, 2 do room[ARGV[index]] = tonumber(ARGV[index + 1]) end

local quiet = redis.call('EXISTS', P .. 'gone', P .. 'later') > 0
for _, name in ipairs(quiet and {'gone', 'later'} or {}) do
  redis.call('ZREMRANGEBYSCORE', P .. name, '-inf', now)
end

local function wanted(lane, recipient, text)
  local hook = quiet and string.match(text, '^[^\\n]*\\n([^\\n]+)\\n')
  if not hook then return true end
  local url = cjson.decode(hook).url
  if redis.call('ZSCORE', P .. 'gone', url) then
    shelve(lane, recipient, ARGV[5])
    return false
  end
  local later = redis.call('ZSCORE', P .. 'later', url)
  if later then redis.call('ZADD', P .. 'lane:' .. lane, later, recipient) end
  return not later
end

local function take(lane, most)
  local took, key = 0, P .. 'lane:' .. lane
  for _, recipient in ipairs(redis.call('ZRANGEBYSCORE', key, '-inf', now, 'LIMIT', 0, most + 100)) do
    if took == most then break end
    local first = redis.call('LINDEX', P .. 'events:' .. recipient, 0)
    if not first then
      redis.call('ZREM', key, recipient)
      redis.call('HDEL', P .. 'waiting', recipient)
    elseif wanted(lane, recipient, first) then
      took = took + 1
      redis.call('ZADD', key, held, recipient)
      local tried = redis.call('HGET', P .. 'waiting', recipient) or '0 ' .. ms(now)
      found[#found + 1] = {lane, recipient, first, tried, ms(now), held}
    end
  end
  return took
end

local lanes, due = {}, {}
local function consider(lane, score)
  if due[lane] or tonumber(score) > now then return end
  due[lane], lanes[#lanes + 1] = tonumber(score), lane
end

local named = 0
for lane, most in pairs(room) do
  named = named + 1
  local score = most > 0 and redis.call('ZSCORE', P .. 'outbox', lane)
  if score then consider(lane, score) end
end
if others > 0 then
  local first = redis.call('ZRANGEBYSCORE', P .. 'outbox', '-inf', now, 'WITHSCORES', 'LIMIT', 0,
                           others + named + 20)
  for index = 1, #first, 2 do
    local lane = first[index]
    if not room[lane] and string.sub(lane, 1, 2) == '//' then consider(lane, first[index + 1]) end
  end
end
table.sort(lanes, function(one, other) return due[one] < due[other] end)

for _, lane in ipairs(lanes) do
  local failures = down(lane)
  local most = math.min(room[lane] or others, left)
  if failures > 0 or not room[lane] then most = math.min(most, 1) end
  if most > 0 then
    local took = take(lane, most)
    if took > 0 and failures > 0 then set_down(lane, failures, held) end
    if not room[lane] then others = others - took end
    left = left - took
    settle(lane)
  end
end
return found
"""
)

# ARGV: P, lane, recipient, what it is held by: it is told, or it need not be
DELIVERED = (
    NOW
    + _PARKING
    + """
local lane, recipient, key = ARGV[2], ARGV[3], P .. 'events:' .. ARGV[3]
if not holds(lane, recipient, ARGV[4]) then return 0 end
redis.call('LPOP', key)
redis.call('ZREM', P .. 'lane:' .. lane, recipient)
redis.call('HDEL', P .. 'waiting', recipient)
redis.call('HDEL', P .. 'down', lane)
if redis.call('EXISTS', key) == 1 then enter(lane, recipient) else settle(lane) end
return 1
"""
)

# ARGV: P, lane, recipient, what it is held by, delay (ms), first pause of a lane and its longest (ms), URL
# and for how long it wants to hear nothing (ms)
# What fails while the lane is left alone was on its way before, and says nothing new.
POSTPONE = (
    NOW
    + _PARKING
    + """
local lane, recipient, held = ARGV[2], ARGV[3], tonumber(ARGV[4])
if not holds(lane, recipient, held) then return 0 end
local tries, since = string.match(redis.call('HGET', P .. 'waiting', recipient) or '0 0', '^(%d+) (%d+)$')
redis.call('HSET', P .. 'waiting', recipient, ms(tries + 1) .. ' ' .. since)
redis.call('ZADD', P .. 'lane:' .. lane, now + ARGV[5], recipient)
local failures, ends = down(lane)
if now >= ends or ends == held then
  local pause = failures > 0 and math.min(ARGV[6] * 2 ^ math.min(failures - 1, 20), tonumber(ARGV[7])) or 0
  set_down(lane, failures + 1, now + pause)
end
if tonumber(ARGV[9]) > 0 then redis.call('ZADD', P .. 'later', now + ARGV[9], ARGV[8]) end
settle(lane)
return 1
"""
)

# ARGV: P, lane, recipient, what it is held by, retention (ms): nobody tries any more, until it is replayed
PARK = (
    NOW
    + _PARKING
    + """
local lane, recipient, held = ARGV[2], ARGV[3], tonumber(ARGV[4])
if not holds(lane, recipient, held) then return 0 end
shelve(lane, recipient, ARGV[5])
local failures, ends = down(lane)
if ends == held then set_down(lane, failures, now) end
settle(lane)
return 1
"""
)

# ARGV: P, lane, how long they have waited (ms), retention (ms), how many are looked at -> how many are parked
PARK_OLD = (
    NOW
    + _PARKING
    + """
local lane, parked = ARGV[2], 0
local due = redis.call('ZRANGEBYSCORE', P .. 'lane:' .. lane, '-inf', now, 'LIMIT', 0, ARGV[5])
for _, recipient in ipairs(due) do
  local since = string.match(redis.call('HGET', P .. 'waiting', recipient) or '', '%d+$')
  if since and tonumber(since) <= now - ARGV[3] then
    shelve(lane, recipient, ARGV[4])
    parked = parked + 1
  end
end
settle(lane)
return parked
"""
)

# ARGV: P, lane, recipient
UNPARK = (
    NOW
    + _LANES
    + """
local lane, recipient = ARGV[2], ARGV[3]
if redis.call('ZREM', P .. 'parked', recipient .. ' ' .. lane) == 0 then return 0 end
if redis.call('EXISTS', P .. 'events:' .. recipient) == 0 then return 0 end
enter(lane, recipient)
return 1
"""
)

# ARGV: P, URL, for how long (ms): it wants nothing any more
DISABLE = (
    NOW
    + """
redis.call('ZREMRANGEBYSCORE', P .. 'gone', '-inf', now)
redis.call('ZADD', P .. 'gone', now + ARGV[3], ARGV[2])
return 1
"""
)
