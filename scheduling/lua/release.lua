-- owner, all | some, failed (1) or not (0), (id, attempt)... -> how many went back
local owner, ids, attempts, released = ARGV[1], {}, {}, 0
if ARGV[2] == 'all' then
  ids = call('HKEYS', Q .. ':own:' .. owner)
  table.sort(ids)
else
  for i = 4, #ARGV, 2 do
    ids[#ids + 1] = ARGV[i]
    attempts[ARGV[i]] = tonumber(ARGV[i + 1])
  end
end
local queue = load_queue()
for _, id in ipairs(ids) do
  local attempt, lease = held(owner, id)
  if attempt and attempt == (attempts[id] or attempt) then
    requeue(queue, owner, id, lease, ARGV[3] == '1')
    released = released + 1
  end
end
save(queue)
return released
