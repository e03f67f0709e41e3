-- id, {entry, {flow, weight, rank}}, revision, depth limit, body, limit of waiting tokens ('' is none),
-- '1' to drop requests of lower priority rather than refuse this one
--   -> {status, depth, active revision, {id, body, of those dropped, ...}, where the limit of tokens refused: how many wait}
local id, body = ARGV[1], ARGV[5]
local packed = cmsgpack.unpack(ARGV[2])
local entry, placement = packed[1], packed[2]
local queue = load_queue('waiting_tokens', 't:' .. entry[TENANT], 'p:' .. entry[PRIORITY])
local record = Q .. ':req:' .. id
if call('EXISTS', record) == 1 then return { 'duplicate', queue.depth, queue.revision, {} } end
if tonumber(ARGV[3]) ~= queue.revision then return { 'stale', queue.depth, queue.revision, {} } end

local depth_limit, tokens_limit = tonumber(ARGV[4]), tonumber(ARGV[6])
local tokens = tokens_limit and queue.known.waiting_tokens + entry[PROMPT] + entry[MAXIMUM]

-- A request longer than the limit comes in when nothing else waits.
local function over(depth, tokens_then)
  return depth >= depth_limit or tokens_limit and depth > 0 and tokens_then > tokens_limit
end

-- The requests of least right that have to go for this one; nil where those of lower priority do not suffice.
local function find_victims()
  local victims, depth, left = {}, queue.depth, tokens
  local worst = call('ZREVRANGE', RIGHT, 0, MAX_SHED - 1, 'WITHSCORES')
  for i = 1, #worst, 2 do
    if math.floor(tonumber(worst[i + 1]) / PRIORITY_STEP) <= entry[PRIORITY] then return nil end
    local r = call('HMGET', Q .. ':req:' .. worst[i], 'entry', 'body')
    if not r[1] then call('ZREM', RIGHT, worst[i]) end
    if r[1] then
      local victim = cmsgpack.unpack(r[1])
      victims[#victims + 1] = { victim, r[2] }
      depth = depth - 1
      left = left and left - victim[PROMPT] - victim[MAXIMUM]
      if not over(depth, left) then return victims end
    end
  end
  return nil
end

local shed = {}
if over(queue.depth, tokens) then
  local victims = ARGV[7] == '1' and depth_limit > 0 and find_victims()
  if not victims then
    return { 'full', queue.depth, queue.revision, {}, queue.depth < depth_limit and queue.known.waiting_tokens }
  end
  for _, victim in ipairs(victims) do
    drop(queue, victim[1], 'shed', clock())
    add(queue, 'shed', 1)
    shed[#shed + 1] = victim[1][ID]
    shed[#shed + 1] = victim[2]
  end
end

entry[NUMBER] = queue.enqueued + 1
local digits = string.format('%016d', entry[NUMBER])
call('HSET', record, 'body', body, 'state', 'queued', 'attempt', 0, 'entry', cmsgpack.pack(entry),
  'at', queue.epoch .. ':' .. digits .. placement[1])
call('ZADD', ARRIVALS, entry[ARRIVAL], id)
call('ZADD', RIGHT, entry[PRIORITY] * PRIORITY_STEP + entry[ARRIVAL], id)
if entry[EXPIRES] and entry[DEADLINE] then call('ZADD', DEADLINES, entry[DEADLINE], id) end
call('ZADD', queue.at .. ':f:' .. placement[1], placement[3], digits .. ':' .. id)
set_backlogged(queue, placement[1], placement[2])
if entry[REPLY_TO] ~= '' then call('SADD', Q .. ':web:' .. entry[REPLY_TO], id) end
count_waiting(queue, entry, 1)
add(queue, 'enqueued', 1)
save(queue)
touch(queue, id)
-- With so many waiting, nobody who could take one is idle.
if queue.depth < 64 then ring() end
return { 'queued', queue.depth + 1, queue.revision, shed }
