-- owner, lease seconds, now -> 1, or 0 where the lease is not there
if not call('ZSCORE', Q .. ':owners', ARGV[1]) then
  forgive(ARGV[1])
  return 0
end
call('ZADD', Q .. ':owners', clock(ARGV[3]) + tonumber(ARGV[2]), ARGV[1])
return 1
