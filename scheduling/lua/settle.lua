-- request id, requests to give back, tokens to give back (below 0: more was used than charged), now
local buckets = Q .. ':buckets'
local taken = call('ZSCORE', Q .. ':running', ARGV[1])
if not taken then return 0 end
call('ZREM', Q .. ':running', ARGV[1])
local now = clock(ARGV[4])

local function give(name, amount)
  local b = call('HMGET', buckets, name, name .. '_s', name .. '_size', name .. '_since')
  if not b[1] or amount == 0 or tonumber(taken) < tonumber(b[4] or 0) then return end
  local size, time = tonumber(b[3]), tonumber(b[2])
  local level = tonumber(b[1]) + math.max(0, now - time) * size / 60 + amount
  -- No debt is larger than the bucket: its tenant is kept out for two minutes at most, whatever an upstream
  -- counted.
  call('HSET', buckets, name, math.max(-size, math.min(size, level)), name .. '_s', math.max(now, time))
end

-- Back to the budget of the day on which they were charged, if that is still the one that counts.
local d = call('HMGET', Q .. ':day', 'day', 'tokens', 'since')
if d[1] and tonumber(d[1]) == math.floor(tonumber(taken) / 86400) and tonumber(taken) >= tonumber(d[3] or 0) then
  call('HSET', Q .. ':day', 'tokens', math.max(0, tonumber(d[2]) - tonumber(ARGV[3])))
end
give('requests', tonumber(ARGV[2]))
give('tokens', tonumber(ARGV[3]))
return 1
