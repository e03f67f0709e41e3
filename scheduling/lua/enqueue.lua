-- id, {entry, {flow, weight, rank}}, revision, depth limit, body -> {status, depth, active revision}
local id, body = ARGV[1], ARGV[5]
local queue = load_queue()
local record = Q .. ':req:' .. id
if call('EXISTS', record) == 1 then return { 'duplicate', queue.depth, queue.revision } end
if tonumber(ARGV[3]) ~= queue.revision then return { 'stale', queue.depth, queue.revision } end
if queue.depth >= tonumber(ARGV[4]) then return { 'full', queue.depth, queue.revision } end

local packed = cmsgpack.unpack(ARGV[2])
local entry, placement = packed[1], packed[2]
entry[NUMBER] = queue.enqueued + 1
local digits = string.format('%016d', entry[NUMBER])
call('HSET', record, 'body', body, 'state', 'queued', 'attempt', 0, 'entry', cmsgpack.pack(entry),
  'at', queue.epoch .. ':' .. digits .. placement[1])
call('ZADD', ARRIVALS, entry[ARRIVAL], id)
call('ZADD', queue.at .. ':f:' .. placement[1], placement[3], digits .. ':' .. id)
set_backlogged(queue, placement[1], placement[2])
if entry[REPLY_TO] ~= '' then call('SADD', Q .. ':web:' .. entry[REPLY_TO], id) end
count_waiting(queue, entry, 1)
add(queue, 'enqueued', 1)
save(queue)
touch(queue, id)
-- With so many waiting, nobody who could take one is idle.
if queue.depth < 64 then ring() end
return { 'queued', queue.depth + 1, queue.revision }
