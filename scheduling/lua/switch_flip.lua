-- token, epoch, revision, policy, params, offset in the list of changes, how many may be left, rules
--   -> {1, requests waiting in the new epoch}, {2} where more are left, {0} where the lock was lost
local queue = load_queue()
if queue.epoch == ARGV[2] then return { 1, queue.depth } end
if call('GET', Q .. ':switch') ~= ARGV[1] then return { 0 } end
local left = call('LRANGE', Q .. ':dirty', ARGV[6], -1)
if #left > tonumber(ARGV[7]) then return { 2 } end

local building = building_queue(ARGV[2])
for _, id in ipairs(call('SMEMBERS', Q .. ':unplaced')) do
  if locate(building, id) then call('SREM', Q .. ':unplaced', id) end
end
for _, id in ipairs(left) do
  local waiting, placed = call('ZSCORE', ARRIVALS, id), locate(building, id)
  if waiting and not placed then call('SADD', Q .. ':unplaced', id) end
  if placed and not waiting then unplace(building, id) end
end
save(building)
call('HSET', META, 'epoch', ARGV[2], 'revision', ARGV[3], 'policy', ARGV[4], 'params', ARGV[5], 'vt', 0)
put_rules(ARGV[8])
call('HDEL', META, 'building')
call('DEL', Q .. ':switch', Q .. ':dirty')
ring()
return { 1, queue.depth }
