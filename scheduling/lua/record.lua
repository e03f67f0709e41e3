-- id -> {state, attempt, output, finish, body, journal bytes, why it was dropped} or nil
local r = call('HMGET', Q .. ':req:' .. ARGV[1], 'state', 'attempt', 'output', 'finish', 'body', 'dropped')
if not r[1] then return nil end
return { r[1], r[2], r[3] or '', r[4] or '', r[5], call('STRLEN', Q .. ':tok:' .. ARGV[1]), r[6] or '' }
