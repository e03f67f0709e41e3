-- Shared by every script, put before it. KEYS[1] is the base of the queue's (or tenant's) keys; all others begin with it
-- and so share its hash tag. Numbers go to redis.call as numbers: Redis then writes them with 17 digits, where Lua's own
-- conversion to a string would keep 14.
--
--   :meta          revision, policy, params, epoch, vt (system virtual time), building (epoch of a switch), totals
--   :waiting       id -> packed entry      :arrivals   id by arrival      :by_priority, :by_tenant   waiting requests
--   :running       id -> packed lease      :owners     owner by the end of its lease
--   :own:OWNER     id -> attempt           :last:OWNER its last numbered claim     :cancels:OWNER ids to stop
--   :req:ID        the record              :tok:ID     the journal        :web:WEB    live ids of a web process
--   :eN:flows      backlogged flows by virtual time   :eN:idle       drained flows that are ahead of the system
--   :eN:f:FLOW     members by rank         :eN:weights  of backlogged flows        :eN:at   id -> 16-digit arrival number, flow
--   :unplaced      waiting ids in no flow  :switch     lock     :dirty     ids touched during a switch    :epochs
--
-- A member is the arrival number in 16 digits, a colon, the id: equal ranks are served in order of arrival.
local call = redis.call
local Q = KEYS[1]
local META, WAITING, RUNNING = Q .. ':meta', Q .. ':waiting', Q .. ':running'

-- Fields of a packed entry and of a packed lease.
local ID, TENANT, PRIORITY, ARRIVAL, PROMPT, MAXIMUM, DEADLINE, SHARE, REPLY_TO, KEEP, NUMBER =
  1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11
local OWNER, ATTEMPT, FLOW, RANK, WEIGHT, EPOCH, ENTRY = 1, 2, 3, 4, 5, 6, 7

local function clock(given)
  if given and given ~= '' then return tonumber(given) end
  local time = call('TIME')
  return tonumber(time[1]) + tonumber(time[2]) / 1000000
end

local function load_queue()
  local m = call('HMGET', META, 'revision', 'policy', 'epoch', 'vt', 'building')
  local building = m[5]
  -- A switch whose lock ran out is dead; nothing is listed for it any more.
  if building and call('EXISTS', Q .. ':switch') == 0 then building = false end
  local epoch = m[3] or '0'
  return {
    revision = tonumber(m[1] or 0), policy = m[2] or 'fifo', epoch = epoch, at = Q .. ':e' .. epoch,
    vt = tonumber(m[4] or 0), building = building,
  }
end

-- Tell a switch that is under way that these requests came, went or moved.
local function touch(queue, id)
  if queue.building then
    call('RPUSH', Q .. ':dirty', id)
    call('EXPIRE', Q .. ':dirty', 600)
  end
end

local function member_of(number, id)
  return string.format('%016d', number) .. ':' .. id
end

local function place(queue, id, number, flow, weight, rank)
  local at = queue.at
  call('ZADD', at .. ':f:' .. flow, rank, member_of(number, id))
  call('HSET', at .. ':at', id, string.format('%016d', number) .. flow)
  call('HSET', at .. ':weights', flow, weight)
  if call('ZADD', at .. ':flows', 'NX', queue.vt, flow) == 1 then
    -- Newly backlogged: a flow that was idle saves no credit, one that is ahead stays ahead.
    local own = tonumber(call('ZSCORE', at .. ':idle', flow) or '0')
    if own > queue.vt then call('ZADD', at .. ':flows', own, flow) end
    call('ZREM', at .. ':idle', flow)
  end
end

-- A flow's last waiting request is gone: remember its virtual time only while that is ahead of the system's.
local function drain(queue, flow, vt)
  call('ZREM', queue.at .. ':flows', flow)
  call('HDEL', queue.at .. ':weights', flow)
  if vt > queue.vt then call('ZADD', queue.at .. ':idle', vt, flow) end
end

-- Where a waiting request stands: its flow and its member there; nil while unplaced.
local function locate(queue, id)
  local placed = call('HGET', queue.at .. ':at', id)
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

local function count(hash, field, by)
  if call('HINCRBY', hash, field, by) <= 0 then call('HDEL', hash, field) end
end

local function start_waiting(entry, packed)
  local id = entry[ID]
  call('HSET', WAITING, id, packed)
  call('ZADD', Q .. ':arrivals', entry[ARRIVAL], id)
  call('HINCRBY', Q .. ':by_priority', entry[PRIORITY], 1)
  call('HINCRBY', Q .. ':by_tenant', entry[TENANT], 1)
  call('HINCRBY', META, 'waiting_tokens', entry[PROMPT] + entry[MAXIMUM])
end

local function stop_waiting(entry)
  local id = entry[ID]
  call('HDEL', WAITING, id)
  call('ZREM', Q .. ':arrivals', id)
  count(Q .. ':by_priority', entry[PRIORITY], -1)
  count(Q .. ':by_tenant', entry[TENANT], -1)
  call('HINCRBY', META, 'waiting_tokens', -(entry[PROMPT] + entry[MAXIMUM]))
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

local function stop_running(id, lease)
  call('HDEL', RUNNING, id)
  call('HDEL', Q .. ':own:' .. lease[OWNER], id)
end

-- Back into the queue at its old rank, its charge returned. After a switch its placement is the old policy's: then it
-- waits unplaced until somebody who can run the new policy places it.
local function requeue(queue, id, lease)
  local entry = cmsgpack.unpack(lease[ENTRY])
  stop_running(id, lease)
  call('LREM', Q .. ':cancels:' .. lease[OWNER], 0, id)
  call('HSET', Q .. ':req:' .. id, 'state', 'queued')
  start_waiting(entry, lease[ENTRY])
  if lease[EPOCH] == queue.epoch then
    correct(queue, lease[FLOW], -(entry[PROMPT] + entry[MAXIMUM]) / lease[WEIGHT])
    place(queue, id, entry[NUMBER], lease[FLOW], lease[WEIGHT], lease[RANK])
  else
    call('SADD', Q .. ':unplaced', id)
  end
  call('HINCRBY', META, 'requeued', 1)
  touch(queue, id)
  ring()
end

local function held(owner, id)
  local packed = call('HGET', RUNNING, id)
  if not packed then return nil end
  local lease = cmsgpack.unpack(packed)
  if lease[OWNER] == owner then return lease end
end

-- The body of the script follows.
