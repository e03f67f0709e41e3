-- now, how many at most -> {id, body, of those dropped, ...}
local queue = load_queue()
local dropped = drop_expired(queue, clock(ARGV[1]), tonumber(ARGV[2]))
save(queue)
return dropped
