-- owner, seconds, now -> 1, or 0 where the lease is not there
local ends = call('ZSCORE', Q .. ':owners', ARGV[1])
if not ends then return 0 end
call('ZADD', Q .. ':owners', math.min(tonumber(ends), clock(ARGV[3]) + tonumber(ARGV[2])), ARGV[1])
return 1
