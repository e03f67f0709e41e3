-- owner, all | some, id... -> how many went back
local owner, ids, released = ARGV[1], {}, 0
if ARGV[2] == 'all' then
  ids = call('HKEYS', Q .. ':own:' .. owner)
  table.sort(ids)
else
  for i = 3, #ARGV do ids[#ids + 1] = ARGV[i] end
end
local queue = load_queue()
for _, id in ipairs(ids) do
  local attempt, lease = held(owner, id)
  if attempt then
    requeue(queue, owner, id, lease)
    released = released + 1
  end
end
save(queue)
return released
