-- owner, id, attempt, state, used tokens, finish, output -> 1 if this owner and attempt held it
local owner, id, used = ARGV[1], ARGV[2], tonumber(ARGV[5])
local lease = held(owner, id)
if not lease or lease[ATTEMPT] ~= tonumber(ARGV[3]) then return 0 end
local queue = load_queue()
local entry = cmsgpack.unpack(lease[ENTRY])
stop_running(id, lease)
if lease[EPOCH] == queue.epoch then
  correct(queue, lease[FLOW], (used - entry[PROMPT] - entry[MAXIMUM]) / lease[WEIGHT])
end
local record = Q .. ':req:' .. id
if call('HDEL', record, 'cancel') == 1 then call('LREM', Q .. ':cancels:' .. owner, 0, id) end
call('HSET', record, 'state', ARGV[4], 'finish', ARGV[6], 'output', ARGV[7])
call('HINCRBY', META, 'finished', 1)
call('HINCRBY', META, 'finished_tokens', used)
forget_later(entry)
return 1
