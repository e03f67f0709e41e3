-- id -> {queued | running | gone, body, owner}
local id = ARGV[1]
local record = Q .. ':req:' .. id
local packed = call('HGET', WAITING, id)
if packed then
  local queue, entry = load_queue(), cmsgpack.unpack(packed)
  unplace(queue, id)
  stop_waiting(entry)
  call('HSET', record, 'state', 'cancelled')
  call('HINCRBY', META, 'cancelled', 1)
  forget_later(entry)
  touch(queue, id)
  return { 'queued', call('HGET', record, 'body') or '', '' }
end
packed = call('HGET', RUNNING, id)
if packed then
  local owner = cmsgpack.unpack(packed)[OWNER]
  -- Kept in the record too, so that the next owner hears of it if this one dies.
  if call('HSETNX', record, 'cancel', 1) == 1 then call('RPUSH', Q .. ':cancels:' .. owner, id) end
  return { 'running', '', owner }
end
return { 'gone', '', '' }
