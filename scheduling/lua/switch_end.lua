-- token -> how many flows of epochs that are over are left to delete
if call('GET', Q .. ':switch') == ARGV[1] then call('DEL', Q .. ':switch', Q .. ':dirty') end
local queue, left = load_queue(), 0
for _, epoch in ipairs(call('SMEMBERS', Q .. ':epochs')) do
  if epoch ~= queue.epoch and epoch ~= queue.building then
    local at = Q .. ':e' .. epoch
    for _, flow in ipairs(call('ZRANGE', at .. ':flows', 0, 499)) do
      call('UNLINK', at .. ':f:' .. flow)
      call('HDEL', META, 'w:' .. epoch .. ':' .. flow)
      call('ZREM', at .. ':flows', flow)
    end
    left = left + call('ZCARD', at .. ':flows')
    if call('EXISTS', at .. ':flows') == 0 then
      call('UNLINK', at .. ':idle', at .. ':at')
      call('SREM', Q .. ':epochs', epoch)
    end
  end
end
return left
