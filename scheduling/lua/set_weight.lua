-- flow, weight -> 1, or 0 where nothing of the flow waits
local queue = load_queue()
if call('HEXISTS', queue.at .. ':weights', ARGV[1]) == 0 then return 0 end
call('HSET', queue.at .. ':weights', ARGV[1], ARGV[2])
return 1
