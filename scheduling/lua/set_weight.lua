-- flow, weight -> 1, or 0 where nothing of the flow waits
local queue = load_queue()
local field = weight_field(queue, ARGV[1])
if call('HEXISTS', META, field) == 0 then return 0 end
call('HSET', META, field, ARGV[2])
return 1
