-- revision, {{id, flow, weight, rank}} -> how many were placed
local queue, placed, vanished = load_queue(), 0, false
if queue.revision ~= tonumber(ARGV[1]) then return 0 end
for _, p in ipairs(cmsgpack.unpack(ARGV[2])) do
  local packed = call('HGET', Q .. ':req:' .. p[1], 'entry')
  local is_unplaced = call('SREM', Q .. ':unplaced', p[1]) == 1
  -- Without a record (evicted, or deleted by hand since it was read) it is gone.
  vanished = vanished or is_unplaced and not packed
  if is_unplaced and packed then
    local entry = cmsgpack.unpack(packed)
    -- While others of the flow wait, theirs is the later word on its weight.
    place(queue, p[1], entry[NUMBER], p[2], weight_of(queue, p[2]) or p[3], p[4])
    touch(queue, p[1])
    ring()
    placed = placed + 1
  end
end
save(queue)
if vanished then begin_recount(queue) end
go_on_recounting(queue)
return placed
