-- revision, {{id, flow, weight, rank}} -> how many were placed
local queue, placed = load_queue(), 0
if queue.revision ~= tonumber(ARGV[1]) then return 0 end
for _, p in ipairs(cmsgpack.unpack(ARGV[2])) do
  local packed = call('HGET', Q .. ':req:' .. p[1], 'entry')
  -- Without a record (evicted, or deleted by hand since it was read) it is gone.
  if call('SREM', Q .. ':unplaced', p[1]) == 1 and packed then
    local entry = cmsgpack.unpack(packed)
    place(queue, p[1], entry[NUMBER], p[2], p[3], p[4])
    touch(queue, p[1])
    ring()
    placed = placed + 1
  end
end
save(queue)
return placed
