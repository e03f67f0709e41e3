-- Shared by every script, put before it. KEYS[1] is the base of the queue's (or tenant's) keys; all others begin with it
-- and so share its hash tag. Numbers go to redis.call as numbers: Redis then writes them with 17 digits, where Lua's own
-- conversion to a string would keep 14. A call costs more than what it does: counters are gathered and written at once.
local call = redis.call
local Q = KEYS[1]

local function clock(given)
  if given and given ~= '' then return tonumber(given) end
  local time = call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1000000
end

