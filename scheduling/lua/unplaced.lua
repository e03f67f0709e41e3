-- limit -> {{revision, policy, params}, packed entries}
local entries, vanished = {}, false
for _, id in ipairs(call('SRANDMEMBER', Q .. ':unplaced', ARGV[1])) do
  local entry = call('HGET', Q .. ':req:' .. id, 'entry')
  if entry then
    entries[#entries + 1] = entry
  else
    call('SREM', Q .. ':unplaced', id)
    vanished = true
  end
end
if vanished then
  local queue = load_queue()
  begin_recount(queue)
  go_on_recounting(queue)
end
return { call('HMGET', META, 'revision', 'policy', 'params'), entries }
