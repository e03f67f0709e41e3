-- token, lock milliseconds, epoch, {{id, arrival number, flow, weight, rank}} to put there, {ids} to take out,
-- offset in the list of what came, went or moved meanwhile, how much of it to read
--   -> {1, {{id, packed entry or ''}}, how many follow}, or {0} where the lock was lost
if call('GET', Q .. ':switch') ~= ARGV[1] then return { 0 } end
call('PEXPIRE', Q .. ':switch', ARGV[2])
local building = { at = Q .. ':e' .. ARGV[3], vt = 0 }
for _, p in ipairs(cmsgpack.unpack(ARGV[4])) do place(building, p[1], p[2], p[3], p[4], p[5]) end
for _, id in ipairs(cmsgpack.unpack(ARGV[5])) do
  if locate(building, id) then unplace(building, id) end
end
local offset, rows = tonumber(ARGV[6]), {}
for i, id in ipairs(call('LRANGE', Q .. ':dirty', offset, offset + tonumber(ARGV[7]) - 1)) do
  rows[i] = { id, call('HGET', WAITING, id) or '' }
end
return { 1, rows, call('LLEN', Q .. ':dirty') - offset - #rows }
