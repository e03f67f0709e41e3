-- owner, id, attempt, state, used tokens, finish, output, prompt tokens among those used (empty: as the entry says)
--   -> 1 if this owner and attempt held it
local owner, id, used = ARGV[1], ARGV[2], tonumber(ARGV[5])
local attempt, lease = held(owner, id)
if not attempt or attempt ~= tonumber(ARGV[3]) then return 0 end
local queue = load_queue()
local entry = cmsgpack.unpack(lease[ENTRY])
stop_running(queue, owner, id)
if lease[EPOCH] == queue.epoch then
  local prompt = tonumber(ARGV[8]) or entry[PROMPT]
  local real = charge(queue, math.min(used, prompt), math.max(0, used - prompt))
  correct(queue, lease[FLOW], (real - charge(queue, entry[PROMPT], entry[MAXIMUM])) / lease[WEIGHT])
end
local record = Q .. ':req:' .. id
if call('HDEL', record, 'cancel') == 1 then call('LREM', Q .. ':cancels:' .. owner, 0, id) end
call('HSET', record, 'state', ARGV[4], 'owner', '', 'finish', ARGV[6], 'output', ARGV[7],
  'ended', clock())
add(queue, 'finished', 1)
add(queue, 'finished_tokens', used)
save(queue)
forget_later(entry)
return 1
