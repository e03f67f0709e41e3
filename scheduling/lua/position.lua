-- id, now -> {flow, before it in the flow, before it in all (estimate)} or nil
local id = ARGV[1]
if not call('ZSCORE', ARRIVALS, id) then return nil end
local queue = load_queue()
local flow, member = locate(queue, id)
if not flow then return { '', queue.depth - 1, queue.depth - 1 } end
local list = queue.at .. ':f:' .. flow
local rank, late_before = call('ZRANK', list, member), late_rank(queue, clock(ARGV[2]))
if late_before then
  -- The late go after the others.
  local num_late = call('ZCOUNT', list, '-inf', '(' .. late_before)
  rank = rank - num_late + (rank < num_late and call('ZCARD', list) or 0)
end
-- With all requests of mean cost, a flow at virtual time v has served k of them when it stands at v + k * cost / weight.
local cost = math.max(1, tonumber(call('HGET', META, 'waiting_tokens')) / queue.depth)
local flows = call('ZRANGE', queue.at .. ':flows', 0, 999, 'WITHSCORES')
local own = tonumber(call('ZSCORE', queue.at .. ':flows', flow))
local due = own + rank * cost / weight_of(queue, flow)
local before = rank
for i = 1, #flows, 2 do
  local vt = tonumber(flows[i + 1])
  if flows[i] ~= flow and vt <= due then
    local served = math.floor((due - vt) * weight_of(queue, flows[i]) / cost) + 1
    before = before + math.min(call('ZCARD', queue.at .. ':f:' .. flows[i]), served)
  end
end
return { flow, rank, before }
