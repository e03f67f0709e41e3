-- id, finish -> 1 for the one who may tell its client, settle its limits and write its history; 0 for all others
if call('ZREM', Q .. ':shed', ARGV[1]) == 0 then return 0 end
local record = Q .. ':req:' .. ARGV[1]
if call('EXISTS', record) == 1 then call('HSET', record, 'finish', ARGV[2]) end
return 1
