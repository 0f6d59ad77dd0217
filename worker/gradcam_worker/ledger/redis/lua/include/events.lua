-- include: destinations

local function append_event(destination, recipient, text, retention_ms)
  local key = prefix .. 'events:' .. recipient
  redis.call('RPUSH', key, text)
  if not redis.call('ZSCORE', prefix .. 'parked', recipient .. ' ' .. destination) then
    enqueue(destination, recipient)
  elseif redis.call('PTTL', key) == -1 then
    redis.call('PEXPIRE', key, retention_ms)
  end
end

-- Record an event in the outbox, for each webhook of the job that receives it and for each sink.
local function record_event(job_id, webhooks, event, document, retention_ms)
  if event == '' then return end
  if webhooks and webhooks ~= '' then
    for index, webhook in ipairs(cjson.decode(webhooks)) do
      for _, name in ipairs(webhook.events) do
        if name == event then
          append_event(webhook.lane, job_id .. ':hook' .. index,
                       event .. '\n' .. webhook.text .. '\n' .. document, retention_ms)
          break
        end
      end
    end
  end
  for _, sink in ipairs(redis.call('SMEMBERS', prefix .. 'sinks')) do
    append_event(sink, job_id .. ':' .. sink, event .. '\n\n' .. document, retention_ms)
  end
end
