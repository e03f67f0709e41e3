-- token, revision, lock milliseconds -> {'', epoch to build} or {'revision' | 'busy', active revision}
local queue, lock = load_queue(), Q .. ':switch'
if tonumber(ARGV[2]) <= queue.revision then return { 'revision', queue.revision } end
if call('GET', lock) ~= ARGV[1] and not call('SET', lock, ARGV[1], 'NX', 'PX', ARGV[3]) then
  return { 'busy', queue.revision }
end
local epoch = call('HINCRBY', META, 'last_epoch', 1)
call('HSET', META, 'building', epoch)
call('SADD', Q .. ':epochs', queue.epoch, epoch)
call('DEL', Q .. ':dirty')
return { '', epoch }
