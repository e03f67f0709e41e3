-- owner, max requests, max tokens, lease seconds, now, claim number, max priority (empty: any)
--   -> {revision, policy, depth, {{id, body, attempt, journal, failures}}, {id, body, of those dropped, ...}, 1 if the
--      claim was cut short}
local owner, lease_s = ARGV[1], tonumber(ARGV[4])
local room_requests, room_tokens = tonumber(ARGV[2]), tonumber(ARGV[3])
local own, last = Q .. ':own:' .. owner, Q .. ':last:' .. owner
local queue = load_queue()
local rows, dropped, more = {}, {}, false
local max_priority = tonumber(ARGV[7]) or math.huge

-- The same claim again: its reply was lost.
local function repeated()
  local packed, start = ARGV[6] ~= '' and call('GET', last), ARGV[6] .. ':'
  if not packed or string.sub(packed, 1, #start) ~= start then return false end
  for _, given in ipairs(cmsgpack.unpack(string.sub(packed, #start + 1))) do
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

-- Take who is next out of a flow's list: the head of those that are not late, else of the late ones.
local function pop(list, late_before)
  local head = late_before and call('ZRANGEBYSCORE', list, late_before, '+inf', 'WITHSCORES', 'LIMIT', 0, 1) or {}
  if not head[1] then return call('ZPOPMIN', list) end
  call('ZREM', list, head[1])
  return head
end

-- Whether somebody was found to wait who has no record.
local vanished = false

-- Leases of those served, and who leaves the orders: written at once.
local leases, arrivals, rights = {}, {}, {}

-- Serve {member, rank}, which was taken out of `flow`, whose virtual time is `vt`, while the system's becomes `system_vt`;
-- false where it does not fit.
local function serve(flow, vt, head, system_vt)
  local list = queue.at .. ':f:' .. flow
  local id = string.sub(head[1] or '', 18)
  local record = Q .. ':req:' .. id
  local r = call('HMGET', record, 'entry', 'body', 'attempt', 'cancel', 'failures', 'at')
  if not r[1] then
    -- Evicted or deleted by hand: a request without a record is gone, the others must not wait behind it.
    vanished = vanished or call('ZSCORE', ARRIVALS, id)
    move(flow, list, vt)
    return true
  end
  local entry, attempt = cmsgpack.unpack(r[1]), r[3] + 1
  local journal = attempt > 1 and call('GET', Q .. ':tok:' .. id) or ''
  local tokens = entry[PROMPT] + #journal / 4
  if tokens > room_tokens or entry[PRIORITY] > max_priority then
    call('ZADD', list, head[2], head[1])
    return false
  end
  room_tokens = room_tokens - tokens

  local weight = weight_of(queue, flow)
  queue.vt = math.max(queue.vt, system_vt)
  move(flow, list, vt + charge(queue, entry[PROMPT], entry[MAXIMUM]) / weight)
  if queue.rules[PROMOTE] then call('ZREM', ARRIVALS, id) else arrivals[#arrivals + 1] = id end
  if attempt == 1 then
    rights[#rights + 1] = id
    if entry[EXPIRES] and entry[DEADLINE] then call('ZREM', DEADLINES, id) end
  end
  if string.sub(r[6], 1, #queue.epoch + 1) ~= queue.epoch .. ':' then call('HDEL', queue.at .. ':at', id) end
  call('HSET', record, 'state', 'running', 'attempt', attempt, 'owner', owner)
  leases[#leases + 1] = id
  leases[#leases + 1] = attempt .. ':' .. cmsgpack.pack({ flow, tonumber(head[2]), weight, queue.epoch, r[1] })
  if r[4] then call('RPUSH', Q .. ':cancels:' .. owner, id) end
  count_waiting(queue, entry, -1)
  add(queue, 'running', 1)
  add(queue, 'claimed', 1)
  add(queue, 'claimed_tokens', entry[PROMPT] + entry[MAXIMUM])
  touch(queue, id)
  rows[#rows + 1] = { id, r[2], attempt, journal, tonumber(r[5] or 0) }
  return true
end

-- Who has waited for so long that it is next: its flow, {member, rank}; nil where nobody has.
local function take_promoted(now)
  while true do
    local oldest = call('ZRANGE', ARRIVALS, 0, 0, 'WITHSCORES')
    local id = oldest[1]
    if not id or now - tonumber(oldest[2]) < queue.rules[PROMOTE] then return nil end
    local flow, member = locate(queue, id)
    if flow then
      local list = queue.at .. ':f:' .. flow
      local rank = call('ZSCORE', list, member)
      call('ZREM', list, member)
      return flow, { member, rank }
    end
    -- Unplaced: its turn comes when it has been placed.
    if call('EXISTS', Q .. ':req:' .. id) == 1 then return nil end
    call('ZREM', ARRIVALS, id)
    call('ZREM', RIGHT, id)
    vanished = true
  end
end

local run, run_left = nil, 0
-- Serve whoever is next: the promoted, a run that has begun, or the flow of least virtual time. False: nobody is, or it
-- does not fit.
local function serve_next(now, late_before)
  local first = call('ZRANGE', queue.at .. ':flows', 0, 0, 'WITHSCORES')
  if not first[1] then return false end
  local flow, first_vt = first[1], tonumber(first[2])
  if queue.rules[PROMOTE] then
    local old, head = take_promoted(now)
    if old then return serve(old, tonumber(call('ZSCORE', queue.at .. ':flows', old)), head, first_vt) end
  end
  local vt = first_vt
  if run_left > 0 and run ~= flow then
    local score = call('ZSCORE', queue.at .. ':flows', run)
    if score then flow, vt = run, tonumber(score) else run_left = 0 end
  end
  if run_left == 0 then run, run_left = flow, queue.rules[RUN] end
  run_left = run_left - 1
  return serve(flow, vt, pop(queue.at .. ':f:' .. flow, late_before), first_vt)
end

local now = clock(ARGV[5])
local late_before = late_rank(queue, now)
if call('ZADD', Q .. ':owners', now + lease_s, owner) == 1 then forgive(owner) end
if not repeated() then
  dropped, more = drop_expired(queue, now, MAX_EXPIRED)
  -- Who comes for the sake of its priority is served where the policy orders by it, and nowhere else.
  if max_priority < math.huge and not queue.rules[PREEMPTS] then room_requests = 0 end
  while not more and #rows < room_requests and serve_next(now, late_before) do end
  if #rows > 0 then
    queue.depth = queue.depth - #rows
    queue.sets.vt = queue.vt
    in_chunks('HSET', own, leases)
    in_chunks('ZREM', ARRIVALS, arrivals)
    in_chunks('ZREM', RIGHT, rights)
    call('ZREMRANGEBYSCORE', queue.at .. ':idle', '-inf', queue.vt)
    if ARGV[6] ~= '' then
      local given = {}
      for i, row in ipairs(rows) do given[i] = { row[1], row[3] } end
      call('SET', last, ARGV[6] .. ':' .. cmsgpack.pack(given), 'EX', 600)
    end
  end
  save(queue)
  if vanished then begin_recount(queue) end
  go_on_recounting(queue)
end
return { queue.revision, queue.policy, queue.depth, rows, dropped, more and 1 or 0 }
