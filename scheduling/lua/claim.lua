-- owner, max requests, max tokens, lease seconds, now, claim number
--   -> {revision, policy, depth, {{id, body, attempt, journal, failures}}}
local owner, lease_s = ARGV[1], tonumber(ARGV[4])
local room_requests, room_tokens = tonumber(ARGV[2]), tonumber(ARGV[3])
local own, last = Q .. ':own:' .. owner, Q .. ':last:' .. owner
local queue = load_queue()
local rows = {}

-- The same claim again: its reply was lost.
local function repeated()
  local packed = ARGV[6] ~= '' and call('GET', last)
  if not packed then return false end
  local claim = cmsgpack.unpack(packed)
  if claim[1] ~= ARGV[6] then return false end
  for _, given in ipairs(claim[2]) do
    local id, attempt = given[1], given[2]
    if held(owner, id) == attempt then
      local r = call('HMGET', Q .. ':req:' .. id, 'body', 'failures')
      rows[#rows + 1] = { id, r[1], attempt, call('GET', Q .. ':tok:' .. id) or '', tonumber(r[2] or 0) }
    end
  end
  return true
end

local function move(flow, list, vt)
  if call('EXISTS', list) == 1 then
    call('ZADD', queue.at .. ':flows', vt, flow)
  else
    drain(queue, flow, vt)
  end
end

-- Serve the head of `flow`, whose virtual time is `vt`; false where it does not fit.
local function serve(flow, vt)
  local list = queue.at .. ':f:' .. flow
  local head = call('ZPOPMIN', list)
  local id = string.sub(head[1] or '', 18)
  local record = Q .. ':req:' .. id
  local r = call('HMGET', record, 'entry', 'body', 'attempt', 'cancel', 'failures')
  if not r[1] then
    -- Evicted or deleted by hand: a request without a record is gone, the others must not wait behind it.
    if call('ZREM', ARRIVALS, id) == 1 then add(queue, 'depth', -1) end
    move(flow, list, vt)
    return true
  end
  local entry, journal = cmsgpack.unpack(r[1]), call('GET', Q .. ':tok:' .. id) or ''
  local tokens = entry[PROMPT] + #journal / 4
  if tokens > room_tokens then
    call('ZADD', list, head[2], head[1])
    return false
  end
  room_tokens = room_tokens - tokens

  local weight, attempt = weight_of(queue, flow), r[3] + 1
  queue.vt = math.max(queue.vt, vt)
  move(flow, list, vt + (entry[PROMPT] + entry[MAXIMUM]) / weight)
  call('ZREM', ARRIVALS, id)
  call('HDEL', queue.at .. ':at', id)
  call('HSET', record, 'state', 'running', 'attempt', attempt, 'owner', owner)
  local lease = { flow, tonumber(head[2]), weight, queue.epoch, r[1] }
  call('HSET', own, id, attempt .. ':' .. cmsgpack.pack(lease))
  if r[4] then call('RPUSH', Q .. ':cancels:' .. owner, id) end
  count_waiting(queue, entry, -1)
  add(queue, 'running', 1)
  add(queue, 'claimed', 1)
  add(queue, 'claimed_tokens', entry[PROMPT] + entry[MAXIMUM])
  touch(queue, id)
  rows[#rows + 1] = { id, r[2], attempt, journal, tonumber(r[5] or 0) }
  return true
end

call('ZADD', Q .. ':owners', clock(ARGV[5]) + lease_s, owner)
if not repeated() then
  while #rows < room_requests do
    local first = call('ZRANGE', queue.at .. ':flows', 0, 0, 'WITHSCORES')
    if not first[1] or not serve(first[1], tonumber(first[2])) then break end
  end
  if #rows > 0 then
    queue.depth = queue.depth - #rows
    queue.sets.vt = queue.vt
    call('ZREMRANGEBYSCORE', queue.at .. ':idle', '-inf', queue.vt)
    if ARGV[6] ~= '' then
      local given = {}
      for i, row in ipairs(rows) do given[i] = { row[1], row[3] } end
      call('SET', last, cmsgpack.pack({ ARGV[6], given }), 'EX', 600)
    end
  end
  save(queue)
end
return { queue.revision, queue.policy, queue.depth, rows }
