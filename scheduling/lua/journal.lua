-- owner, (id, attempt, start, int32 bytes)... -> ids no longer held
local owner, lost = ARGV[1], {}
if #ARGV == 1 then return lost end
local ids = {}
for i = 2, #ARGV, 4 do ids[#ids + 1] = ARGV[i] end
local leases = call('HMGET', Q .. ':own:' .. owner, unpack(ids))
for n, id in ipairs(ids) do
  local i = 4 * n - 2
  local offset, fence = tonumber(ARGV[i + 2]) * 4, ARGV[i + 1] .. ':'
  if not leases[n] or string.sub(leases[n], 1, #fence) ~= fence then
    lost[#lost + 1] = id
  elseif call('STRLEN', Q .. ':tok:' .. id) < offset then
    local queue, _, lease = load_queue(), held(owner, id)
    requeue(queue, owner, id, lease)
    save(queue)
    lost[#lost + 1] = id
  else
    -- Tokens that are there already are written over with themselves.
    call('SETRANGE', Q .. ':tok:' .. id, offset, ARGV[i + 3])
  end
end
return lost
