-- limit -> {{revision, policy, params}, packed entries}
local entries = {}
for _, id in ipairs(call('SRANDMEMBER', Q .. ':unplaced', ARGV[1])) do
  entries[#entries + 1] = call('HGET', Q .. ':req:' .. id, 'entry')
end
return { call('HMGET', META, 'revision', 'policy', 'params'), entries }
