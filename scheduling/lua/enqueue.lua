-- id, {entry, {flow, weight, rank}}, revision, depth limit, body -> {status, depth, active revision}
local id, body = ARGV[1], ARGV[5]
local queue = load_queue()
local depth = call('HLEN', WAITING)
local record = Q .. ':req:' .. id
if call('EXISTS', record) == 1 then return { 'duplicate', depth, queue.revision } end
if tonumber(ARGV[3]) ~= queue.revision then return { 'stale', depth, queue.revision } end
if depth >= tonumber(ARGV[4]) then return { 'full', depth, queue.revision } end

local packed = cmsgpack.unpack(ARGV[2])
local entry, placement = packed[1], packed[2]
entry[NUMBER] = call('HINCRBY', META, 'enqueued', 1)
call('HSET', record, 'body', body, 'state', 'queued', 'attempt', 0)
start_waiting(entry, cmsgpack.pack(entry))
place(queue, id, entry[NUMBER], placement[1], placement[2], placement[3])
if entry[REPLY_TO] ~= '' then call('SADD', Q .. ':web:' .. entry[REPLY_TO], id) end
touch(queue, id)
ring()
return { 'queued', depth + 1, queue.revision }
