-- token, lock milliseconds, epoch, {{flow, weight, {rank, arrival number, id, ...}}} to put there, {ids} to take out,
-- 'scan' (what waits) or 'changes' (what came, went or moved since), where to read on, how much
--   -> {1, {{id, packed entry or '' if it waits no more}}, where to read on, changes that follow}, {0} if the lock was lost
if call('GET', Q .. ':switch') ~= ARGV[1] then return { 0 } end
call('PEXPIRE', Q .. ':switch', ARGV[2])
local building = building_queue(ARGV[3])

for _, group in ipairs(cmsgpack.unpack(ARGV[4])) do
  local flow, requests, members, places = group[1], group[3], {}, {}
  for i = 1, #requests, 3 do
    local digits, id = string.format('%016d', requests[i + 1]), requests[i + 2]
    members[#members + 1] = requests[i]
    members[#members + 1] = digits .. ':' .. id
    places[#places + 1] = id
    places[#places + 1] = digits .. flow
  end
  call('ZADD', building.at .. ':f:' .. flow, unpack(members))
  call('HSET', building.at .. ':at', unpack(places))
  set_backlogged(building, flow, group[2])
end
for _, id in ipairs(cmsgpack.unpack(ARGV[5])) do
  if locate(building, id) then unplace(building, id) end
end
save(building)

local rows, next_read, limit = {}, tonumber(ARGV[7]), tonumber(ARGV[8])
if ARGV[6] == 'scan' then
  -- Gives everything that waits from beginning to end of the scan; the rest stands among the changes.
  local page = call('ZSCAN', ARRIVALS, ARGV[7], 'COUNT', limit)
  next_read = tonumber(page[1])
  for i = 1, #page[2], 2 do
    local id = page[2][i]
    rows[#rows + 1] = { id, call('HGET', Q .. ':req:' .. id, 'entry') or '' }
  end
elseif limit > 0 then
  local ids = call('LRANGE', Q .. ':dirty', next_read, next_read + limit - 1)
  next_read = next_read + #ids
  for i, id in ipairs(ids) do
    local r = call('HMGET', Q .. ':req:' .. id, 'state', 'entry')
    rows[i] = { id, r[1] == 'queued' and r[2] or '' }
  end
end
return { 1, rows, next_read, call('LLEN', Q .. ':dirty') - next_read }
