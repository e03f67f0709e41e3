-- now -> {running, requests left, tokens left}
local now = clock(ARGV[1])

local function left(name)
  local b = call('HMGET', Q .. ':buckets', name, name .. '_s', name .. '_size')
  if not b[1] then return '' end
  local size = tonumber(b[3])
  return tostring(math.max(0, math.floor(math.min(size, tonumber(b[1]) + math.max(0, now - tonumber(b[2])) * size / 60))))
end

return { call('ZCARD', Q .. ':running'), left('requests'), left('tokens') }
