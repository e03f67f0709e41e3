-- now -> {{owner, how many requests went back}}
local queue, expired, num = load_queue(), {}, 0
local owners = call('ZRANGEBYSCORE', Q .. ':owners', '-inf', clock(ARGV[1]), 'LIMIT', 0, 100)
for _, owner in ipairs(owners) do
  -- A script holds up all others, so a mass of dead owners goes in several calls.
  if num >= 2000 then break end
  local ids = call('HKEYS', Q .. ':own:' .. owner)
  table.sort(ids)
  for _, id in ipairs(ids) do
    local _, lease = held(owner, id)
    requeue(queue, owner, id, lease, true)
  end
  in_chunks('SADD', Q .. ':charged:' .. owner, ids)
  call('EXPIRE', Q .. ':charged:' .. owner, FORGIVE_S)
  call('ZREM', Q .. ':owners', owner)
  call('DEL', Q .. ':own:' .. owner, Q .. ':last:' .. owner, Q .. ':cancels:' .. owner)
  num = num + #ids
  expired[#expired + 1] = { owner, #ids }
end
save(queue)
go_on_recounting(queue)
return expired
