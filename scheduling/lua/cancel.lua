-- id, token of the call -> {queued | running | gone, body, owner}
local id = ARGV[1]
local record = Q .. ':req:' .. id
local r = call('HMGET', record, 'state', 'entry', 'body', 'owner', 'canceller')
-- The same call again: its reply was lost.
if r[1] == 'cancelled' and r[5] == ARGV[2] then return { 'queued', r[3], '' } end
if r[1] == 'queued' then
  local queue, entry = load_queue(), cmsgpack.unpack(r[2])
  unplace(queue, id)
  leave_orders(entry)
  call('HSET', record, 'state', 'cancelled', 'ended', clock(), 'canceller', ARGV[2])
  count_waiting(queue, entry, -1)
  add(queue, 'cancelled', 1)
  save(queue)
  forget_later(entry)
  touch(queue, id)
  return { 'queued', r[3], '' }
end
if r[1] == 'running' then
  -- Kept in the record too, so that the next owner hears of it if this one dies.
  if call('HSETNX', record, 'cancel', 1) == 1 then call('RPUSH', Q .. ':cancels:' .. r[4], id) end
  return { 'running', '', r[4] }
end
return { 'gone', '', '' }
