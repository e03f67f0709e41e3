-- name, parameters, revision, rules ('' if plain) -> 1, or 0 where a policy is active or requests wait
if call('HEXISTS', META, 'policy') == 1 or call('EXISTS', ARRIVALS) == 1 then return 0 end
call('HSET', META, 'policy', ARGV[1], 'params', ARGV[2], 'revision', ARGV[3])
put_rules(ARGV[4])
return 1
