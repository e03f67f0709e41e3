-- request id, requests to give back, tokens to give back, now
local buckets = Q .. ':buckets'
if call('ZREM', Q .. ':running', ARGV[1]) == 0 then return 0 end
local now = clock(ARGV[4])

local function give(name, amount)
  local b = call('HMGET', buckets, name, name .. '_s', name .. '_size')
  if not b[1] or amount <= 0 then return end
  local size, time = tonumber(b[3]), tonumber(b[2])
  local level = tonumber(b[1]) + math.max(0, now - time) * size / 60 + amount
  call('HSET', buckets, name, math.min(size, level), name .. '_s', math.max(now, time))
end

give('requests', tonumber(ARGV[2]))
give('tokens', tonumber(ARGV[3]))
return 1
