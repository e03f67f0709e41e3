-- token, lock milliseconds, epoch, 'scan' (what waits) or 'changes' (what came, went or moved since), where to read on,
-- how much, changes that the last scan knew of, packed: {{id to take out...}, {id, place...}, {{flow, weight, {rank,
-- member...}}...}}
--   -> {1, {id, packed entry or '' if it waits no more, ...}, where to read on, changes in all}, {0} if the lock was lost
if call('GET', Q .. ':switch') ~= ARGV[1] then return { 0 } end
call('PEXPIRE', Q .. ':switch', ARGV[2])
local building = building_queue(ARGV[3])

local gone, places, flows = unpack(cmsgpack.unpack(ARGV[8]))
for _, id in ipairs(gone) do
  if locate(building, id) then unplace(building, id) end
end
in_chunks('HSET', building.at .. ':at', places)
for _, placed in ipairs(flows) do
  local flow, weight, members = unpack(placed)
  in_chunks('ZADD', building.at .. ':f:' .. flow, members)
  set_backlogged(building, flow, weight)
end
save(building)

local rows, from, limit = {}, tonumber(ARGV[5]), tonumber(ARGV[6])
local changes = call('LLEN', Q .. ':dirty')
if ARGV[4] == 'scan' then
  -- From the latest arrival to the first. Whoever leaves moves those not read yet away from what was read; whoever comes
  -- may move one of them back, and is among the changes: so many are read again.
  local to = from < 0 and call('ZCARD', ARRIVALS) or from + changes - tonumber(ARGV[7])
  from = math.max(0, (from < 0 and to or from) - limit)
  for i, id in ipairs(to > 0 and call('ZRANGE', ARRIVALS, from, to - 1) or {}) do
    rows[2 * i - 1], rows[2 * i] = id, call('HGET', Q .. ':req:' .. id, 'entry') or ''
  end
elseif limit > 0 then
  for i, id in ipairs(call('LRANGE', Q .. ':dirty', from, from + limit - 1)) do
    local r = call('HMGET', Q .. ':req:' .. id, 'state', 'entry')
    rows[2 * i - 1], rows[2 * i] = id, r[1] == 'queued' and r[2] or ''
  end
  from = from + #rows / 2
end
return { 1, rows, from, changes }
