-- owner, max requests, max tokens, lease seconds, now, claim number -> {revision, policy, depth, {{id, body, attempt, journal}}}
local owner, lease_s = ARGV[1], tonumber(ARGV[4])
local room_requests, room_tokens = tonumber(ARGV[2]), tonumber(ARGV[3])
local own, last = Q .. ':own:' .. owner, Q .. ':last:' .. owner
local queue = load_queue()
local rows = {}

local function row(id, attempt)
  return { id, call('HGET', Q .. ':req:' .. id, 'body'), attempt, call('GET', Q .. ':tok:' .. id) or '' }
end

-- The same claim again: its reply was lost.
local function repeated()
  local packed = ARGV[6] ~= '' and call('GET', last)
  if not packed then return false end
  local claim = cmsgpack.unpack(packed)
  if claim[1] ~= ARGV[6] then return false end
  for _, given in ipairs(claim[2]) do
    if tonumber(call('HGET', own, given[1]) or '0') == given[2] then rows[#rows + 1] = row(given[1], given[2]) end
  end
  return true
end

-- Serve the head of `flow`; false where it does not fit.
local function serve(flow, vt)
  local list = queue.at .. ':f:' .. flow
  local head = call('ZRANGE', list, 0, 0, 'WITHSCORES')
  local id = string.sub(head[1], 18)
  local packed = call('HGET', WAITING, id)
  local entry = cmsgpack.unpack(packed)
  local tokens = entry[PROMPT] + call('STRLEN', Q .. ':tok:' .. id) / 4
  if tokens > room_tokens then return false end
  room_tokens = room_tokens - tokens

  queue.vt = math.max(queue.vt, vt)
  local weight = tonumber(call('HGET', queue.at .. ':weights', flow))
  local charged = vt + (entry[PROMPT] + entry[MAXIMUM]) / weight
  call('ZREM', list, head[1])
  call('HDEL', queue.at .. ':at', id)
  if call('EXISTS', list) == 1 then
    call('ZADD', queue.at .. ':flows', charged, flow)
  else
    drain(queue, flow, charged)
  end
  stop_waiting(entry)

  local record = Q .. ':req:' .. id
  local attempt = call('HINCRBY', record, 'attempt', 1)
  call('HSET', record, 'state', 'running')
  if call('HEXISTS', record, 'cancel') == 1 then call('RPUSH', Q .. ':cancels:' .. owner, id) end
  local lease = { owner, attempt, flow, tonumber(head[2]), weight, queue.epoch, packed }
  call('HSET', RUNNING, id, cmsgpack.pack(lease))
  call('HSET', own, id, attempt)
  touch(queue, id)
  rows[#rows + 1] = row(id, attempt)
  return entry[PROMPT] + entry[MAXIMUM]
end

call('ZADD', Q .. ':owners', clock(ARGV[5]) + lease_s, owner)
if not repeated() then
  local claimed_tokens = 0
  while #rows < room_requests do
    local first = call('ZRANGE', queue.at .. ':flows', 0, 0, 'WITHSCORES')
    local served = first[1] and serve(first[1], tonumber(first[2]))
    if not served then break end
    claimed_tokens = claimed_tokens + served
  end
  if #rows > 0 then
    call('HSET', META, 'vt', queue.vt)
    call('HINCRBY', META, 'claimed', #rows)
    call('HINCRBY', META, 'claimed_tokens', claimed_tokens)
    call('ZREMRANGEBYSCORE', queue.at .. ':idle', '-inf', queue.vt)
  end
  if ARGV[6] ~= '' then
    local given = {}
    for i, r in ipairs(rows) do given[i] = { r[1], r[3] } end
    call('SET', last, cmsgpack.pack({ ARGV[6], given }), 'EX', 600)
  end
end
return { queue.revision, queue.policy, call('HLEN', WAITING), rows }
