-- Shared by the scripts of a queue, put behind the prelude. Its keys:
--
--   :meta          revision, policy, params, rules (packed, absent for plain ones), epoch, vt (system virtual time),
--                  building (epoch of a switch), last_epoch, recounting, recount_again, totals and counts, t:TENANT and p:PRIORITY waiting requests, w:EPOCH:FLOW weights of backlogged flows
--   :arrivals      waiting ids by arrival        :unplaced   waiting ids in no flow
--   :right         waiting ids that were never claimed, by priority, then arrival: the last has the least right to stay
--   :shed          ids dropped while they waited whose clients have not been told, by the time of it
--   :deadlines     waiting ids that were never claimed and are dropped when their deadline passes, by that
--   :eN:flows      backlogged flows by virtual time          :eN:idle   drained flows that are ahead of the system
--   :eN:f:FLOW     members by rank; a member is the arrival number in 16 digits, a colon, the id: so equal ranks are
--                  served in order of arrival
--   :owners        owners by the end of their lease          :own:OWNER   id -> attempt, colon, packed lease
--   :last:OWNER    its last numbered claim                   :cancels:OWNER   ids to stop
--   :charged:OWNER ids for which the end of its lease counted as a failure, should it come back
--   :req:ID        the record: body, state, attempt, entry (packed), at (epoch, colon, arrival number, flow), owner,
--                  cancel, finish, output, ended (time), dropped (why), canceller (token of the call that took it out),
--                  failures                                 :tok:ID   the journal       :web:WEB   its live ids
--   :eN:at         id -> arrival number, flow, of waiting requests that a switch placed, where `at` is of an older epoch
--   :switch        a switch's lock      :dirty   ids touched during it      :epochs   those that may have keys
local META, ARRIVALS, RIGHT, DEADLINES = Q .. ':meta', Q .. ':arrivals', Q .. ':right', Q .. ':deadlines'

-- Fields of a packed entry and of a packed lease.
local ID, TENANT, PRIORITY, ARRIVAL, PROMPT, MAXIMUM, DEADLINE, SHARE, REPLY_TO, KEEP, EXPIRES, NUMBER =
  1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12
local FLOW, RANK, WEIGHT, EPOCH, ENTRY = 1, 2, 3, 4, 5

-- Rules of the active policy, see core/rules.py.
local PROMOTE, SLACK, PER_REQUEST, PER_PROMPT, PER_OUTPUT, RUN, PREEMPTS = 1, 2, 3, 4, 5, 6, 7
local PLAIN = { false, false, 0, 1, 1, 1, false }
local PRIORITY_STEP, MAX_SHED, MAX_EXPIRED = 1e10, 16, 100
-- Waiting requests that a step of a recount counts: about 1 ms.
local RECOUNT_STEP = 200
-- How long an owner whose lease ended may take to come back and have its requests' failures taken back.
local FORGIVE_S = 3600

-- What meta says of the queue; `...` are counters that will change, read along so that `save` need not.
local function load_queue(...)
  local m = call('HMGET', META, 'revision', 'policy', 'epoch', 'vt', 'building', 'depth', 'enqueued', 'rules', 'recounting',
    ...)
  local building = m[5]
  -- A switch whose lock ran out is dead; nothing is listed for it any more.
  if building and call('EXISTS', Q .. ':switch') == 0 then building = false end
  local epoch, depth, enqueued = m[3] or '0', tonumber(m[6] or 0), tonumber(m[7] or 0)
  local known = { depth = depth, enqueued = enqueued }
  for i = 1, select('#', ...) do known[select(i, ...)] = tonumber(m[9 + i] or 0) end
  return {
    revision = tonumber(m[1] or 0), policy = m[2] or 'fifo', epoch = epoch, at = Q .. ':e' .. epoch,
    vt = tonumber(m[4] or 0), building = building, depth = depth, enqueued = enqueued, known = known,
    rules = m[8] and cmsgpack.unpack(m[8]) or PLAIN, recounting = tonumber(m[9]), sums = {}, sets = {}, weights = {},
  }
end

-- A queue in the epoch that a switch builds.
local function building_queue(epoch)
  return { epoch = epoch, at = Q .. ':e' .. epoch, vt = 0, known = {}, sums = {}, sets = {}, weights = {} }
end

-- A command on a key with any number of words: Lua's stack holds some thousands.
local function in_chunks(command, key, words)
  for i = 1, #words, 1000 do call(command, key, unpack(words, i, math.min(#words, i + 999))) end
end

local function add(queue, field, by)
  queue.sums[field] = (queue.sums[field] or 0) + by
end

-- Write what was gathered: `sums` are added to fields of meta (tenants and priorities without any are dropped), `sets`
-- replace them.
local function save(queue)
  local unknown, values, drops, known = {}, {}, {}, queue.known
  for field in pairs(queue.sums) do
    if not known[field] then unknown[#unknown + 1] = field end
  end
  for first = 1, #unknown, 1000 do
    local last = math.min(#unknown, first + 999)
    for i, old in ipairs(call('HMGET', META, unpack(unknown, first, last))) do
      known[unknown[first + i - 1]] = tonumber(old or 0)
    end
  end
  for field, by in pairs(queue.sums) do
    local new = known[field] + by
    if new == 0 and string.match(field, '^[tp]:') then
      drops[#drops + 1] = field
    else
      values[#values + 1] = field
      values[#values + 1] = new
    end
  end
  for field, value in pairs(queue.sets) do
    if value then
      values[#values + 1] = field
      values[#values + 1] = value
    else
      drops[#drops + 1] = field
    end
  end
  in_chunks('HSET', META, values)
  in_chunks('HDEL', META, drops)
end

-- Tell a switch that is under way that this request came, went or moved.
local function touch(queue, id)
  if queue.building then
    if call('RPUSH', Q .. ':dirty', id) == 1 then call('EXPIRE', Q .. ':dirty', 600) end
  end
end

-- What a flow is charged for a request of so many tokens.
local function charge(queue, prompt, output)
  local rules = queue.rules
  return rules[PER_REQUEST] + rules[PER_PROMPT] * prompt + rules[PER_OUTPUT] * output
end

-- The rank below which a request is late; nil without such a rule.
local function late_rank(queue, now)
  return queue.rules[SLACK] and string.format('%.17g', now + queue.rules[SLACK])
end

local function put_rules(packed)
  if packed == '' then call('HDEL', META, 'rules') else call('HSET', META, 'rules', packed) end
end

local function weight_field(queue, flow)
  return 'w:' .. queue.epoch .. ':' .. flow
end

local function weight_of(queue, flow)
  local weight = queue.weights[flow]
  if not weight then
    weight = tonumber(call('HGET', META, weight_field(queue, flow)))
    queue.weights[flow] = weight
  end
  return weight
end

local function set_backlogged(queue, flow, weight)
  queue.sets[weight_field(queue, flow)] = weight
  queue.weights[flow] = weight
  if call('ZADD', queue.at .. ':flows', 'NX', queue.vt, flow) == 1 then
    -- Newly backlogged: a flow that was idle saves no credit, one that is ahead stays ahead.
    local own = tonumber(call('ZSCORE', queue.at .. ':idle', flow) or '0')
    if own > queue.vt then call('ZADD', queue.at .. ':flows', own, flow) end
    call('ZREM', queue.at .. ':idle', flow)
  end
end

local function place(queue, id, number, flow, weight, rank)
  local digits = string.format('%016d', number)
  call('ZADD', queue.at .. ':f:' .. flow, rank, digits .. ':' .. id)
  call('HSET', Q .. ':req:' .. id, 'at', queue.epoch .. ':' .. digits .. flow)
  set_backlogged(queue, flow, weight)
end

-- A flow's last waiting request is gone: remember its virtual time only while that is ahead of the system's.
local function drain(queue, flow, vt)
  call('ZREM', queue.at .. ':flows', flow)
  queue.sets[weight_field(queue, flow)] = false
  if vt > queue.vt then call('ZADD', queue.at .. ':idle', vt, flow) end
end

-- Where a waiting request stands: its flow and its member there; nil while unplaced.
local function locate(queue, id)
  local prefix, placed = queue.epoch .. ':', call('HGET', Q .. ':req:' .. id, 'at')
  if placed and string.sub(placed, 1, #prefix) == prefix then
    placed = string.sub(placed, #prefix + 1)
  else
    placed = call('HGET', queue.at .. ':at', id)
  end
  if not placed then return nil end
  return string.sub(placed, 17), string.sub(placed, 1, 16) .. ':' .. id
end

local function unplace(queue, id)
  local flow, member = locate(queue, id)
  if not flow then
    call('SREM', Q .. ':unplaced', id)
    return
  end
  local list = queue.at .. ':f:' .. flow
  call('ZREM', list, member)
  call('HDEL', queue.at .. ':at', id)
  if call('EXISTS', list) == 0 then
    drain(queue, flow, tonumber(call('ZSCORE', queue.at .. ':flows', flow)))
  end
end

-- Give a flow back (or charge it) what a claim took too much (or too little).
local function correct(queue, flow, delta)
  local own = call('ZSCORE', queue.at .. ':flows', flow)
  if own then
    call('ZADD', queue.at .. ':flows', tonumber(own) + delta, flow)
    return
  end
  own = tonumber(call('ZSCORE', queue.at .. ':idle', flow) or queue.vt) + delta
  if own > queue.vt then
    call('ZADD', queue.at .. ':idle', own, flow)
  else
    call('ZREM', queue.at .. ':idle', flow)
  end
end

-- Take a waiting request out of the orders that cut across the flows.
local function leave_orders(entry)
  call('ZREM', ARRIVALS, entry[ID])
  call('ZREM', RIGHT, entry[ID])
  if entry[EXPIRES] and entry[DEADLINE] then call('ZREM', DEADLINES, entry[ID]) end
end

local function count_entry(queue, prefix, entry, by)
  add(queue, prefix .. 'depth', by)
  add(queue, prefix .. 'waiting_tokens', by * (entry[PROMPT] + entry[MAXIMUM]))
  add(queue, prefix .. 't:' .. entry[TENANT], by)
  add(queue, prefix .. 'p:' .. entry[PRIORITY], by)
end

local function count_waiting(queue, entry, by)
  count_entry(queue, '', entry, by)
  if queue.recounting and entry[ARRIVAL] <= queue.recounting then count_entry(queue, 'r:', entry, by) end
end

-- A record has vanished (evicted, or deleted by hand), and nothing else says what it counted for: count anew what waits.
local function begin_recount(queue)
  if queue.recounting then
    call('HSET', META, 'recount_again', 1)
    return
  end
  queue.recounting = -1
  call('HSET', META, 'recounting', -1)
end

-- Put what was counted in the place of what meta says.
local function end_recount(queue)
  local words, again, counted = call('HGETALL', META), false, { depth = 0, waiting_tokens = 0 }
  local drops, values = { 'recounting', 'recount_again' }, {}
  for i = 1, #words, 2 do
    local field = words[i]
    local is_counted = string.sub(field, 1, 2) == 'r:'
    if is_counted then counted[string.sub(field, 3)] = words[i + 1] end
    if is_counted or string.match(field, '^[tp]:') then drops[#drops + 1] = field end
    again = again or field == 'recount_again'
  end
  for field, num in pairs(counted) do
    if num ~= '0' or not string.match(field, '^[tp]:') then
      values[#values + 1] = field
      values[#values + 1] = num
    end
  end
  in_chunks('HDEL', META, drops)
  in_chunks('HSET', META, values)
  queue.depth, queue.recounting = tonumber(counted.depth), nil
  if again then begin_recount(queue) end
end

-- A step of it, after `save`; claims and `expire` go on with it, since a script holds up all others. `recounting` is the
-- arrival up to which was counted, into fields `r:...`; `count_waiting` counts there too what comes and goes before it.
local function go_on_recounting(queue)
  if not queue.recounting then return end
  local from = string.format('(%.17g', queue.recounting)
  local last = call('ZRANGEBYSCORE', ARRIVALS, from, '+inf', 'WITHSCORES', 'LIMIT', RECOUNT_STEP - 1, 1)[2]
  local counted, gone = { sums = {} }, {}
  for _, id in ipairs(call('ZRANGEBYSCORE', ARRIVALS, from, last or '+inf')) do
    local packed = call('HGET', Q .. ':req:' .. id, 'entry')
    if packed then count_entry(counted, 'r:', cmsgpack.unpack(packed), 1) else gone[#gone + 1] = id end
  end
  in_chunks('ZREM', ARRIVALS, gone)
  in_chunks('ZREM', RIGHT, gone)
  for field, by in pairs(counted.sums) do call('HINCRBY', META, field, by) end
  if last then call('HSET', META, 'recounting', last) else end_recount(queue) end
end

-- The bell is a hint, so it holds few elements; an idle engine process also looks by itself now and then.
local function ring()
  if call('LLEN', Q .. ':bell') < 64 then call('LPUSH', Q .. ':bell', '1') end
end

-- Records outlive their request for a while, then go by themselves.
local function forget_later(entry)
  call('EXPIRE', Q .. ':req:' .. entry[ID], entry[KEEP])
  call('EXPIRE', Q .. ':tok:' .. entry[ID], entry[KEEP])
  if entry[REPLY_TO] ~= '' then call('SREM', Q .. ':web:' .. entry[REPLY_TO], entry[ID]) end
end

-- Drop a waiting request; whoever is told of it ends it, or the sweeper.
local function drop(queue, entry, reason, now)
  local id = entry[ID]
  unplace(queue, id)
  leave_orders(entry)
  call('HSET', Q .. ':req:' .. id, 'state', 'failed', 'ended', now, 'dropped', reason)
  call('ZADD', Q .. ':shed', now, id)
  count_waiting(queue, entry, -1)
  queue.depth = queue.depth - 1
  forget_later(entry)
  touch(queue, id)
end

-- Drop so many of those whose deadline has passed -> {id, body, ...}, whether there are more
local function drop_expired(queue, now, limit)
  local ids, dropped = call('ZRANGEBYSCORE', DEADLINES, '-inf', string.format('(%.17g', now), 'LIMIT', 0, limit + 1), {}
  for i = 1, math.min(limit, #ids) do
    local id = ids[i]
    local r = call('HMGET', Q .. ':req:' .. id, 'entry', 'body')
    if r[1] then
      drop(queue, cmsgpack.unpack(r[1]), 'deadline_exceeded', clock())
      add(queue, 'expired', 1)
      dropped[#dropped + 1] = id
      dropped[#dropped + 1] = r[2]
    else
      call('ZREM', DEADLINES, id)
    end
  end
  return dropped, #ids > limit
end

-- The attempt and lease under which `owner` holds a request, or nil.
local function held(owner, id)
  local lease = call('HGET', Q .. ':own:' .. owner, id)
  if not lease then return nil end
  local colon = string.find(lease, ':', 1, true)
  return tonumber(string.sub(lease, 1, colon - 1)), cmsgpack.unpack(string.sub(lease, colon + 1))
end

local function stop_running(queue, owner, id)
  call('HDEL', Q .. ':own:' .. owner, id)
  add(queue, 'running', -1)
end

-- Back into the queue at its old rank, its charge returned. After a switch its placement is the old policy's: then it
-- waits unplaced until somebody who can run the new policy places it.
local function requeue(queue, owner, id, lease, failed)
  local entry = cmsgpack.unpack(lease[ENTRY])
  stop_running(queue, owner, id)
  call('LREM', Q .. ':cancels:' .. owner, 0, id)
  call('HSET', Q .. ':req:' .. id, 'state', 'queued', 'owner', '')
  if failed then call('HINCRBY', Q .. ':req:' .. id, 'failures', 1) end
  call('ZADD', ARRIVALS, entry[ARRIVAL], id)
  count_waiting(queue, entry, 1)
  if lease[EPOCH] == queue.epoch then
    correct(queue, lease[FLOW], -charge(queue, entry[PROMPT], entry[MAXIMUM]) / lease[WEIGHT])
    -- While others of the flow wait, theirs is the later word on its weight.
    place(queue, id, entry[NUMBER], lease[FLOW], weight_of(queue, lease[FLOW]) or lease[WEIGHT], lease[RANK])
  else
    call('SADD', Q .. ':unplaced', id)
  end
  add(queue, 'requeued', 1)
  touch(queue, id)
  ring()
end

-- An owner whose lease had ended is there after all, so nothing that it ran ended it: the failures counted then were none.
local function forgive(owner)
  local charged = Q .. ':charged:' .. owner
  for _, id in ipairs(call('SMEMBERS', charged)) do
    local record = Q .. ':req:' .. id
    if tonumber(call('HGET', record, 'failures') or 0) > 0 then call('HINCRBY', record, 'failures', -1) end
  end
  call('DEL', charged)
end

-- The body of the script follows.
