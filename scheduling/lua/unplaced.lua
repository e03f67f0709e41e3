-- limit -> {{revision, policy, params}, packed entries}
local entries = {}
for _, id in ipairs(call('SRANDMEMBER', Q .. ':unplaced', ARGV[1])) do
  local entry = call('HGET', Q .. ':req:' .. id, 'entry')
  if entry then
    entries[#entries + 1] = entry
  else
    call('SREM', Q .. ':unplaced', id)
  end
end
return { call('HMGET', META, 'revision', 'policy', 'params'), entries }
