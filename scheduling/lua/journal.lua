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
  else
    -- Nearly always these are the next tokens, and that is all; a look beforehand would cost as much again.
    local journal, tokens = Q .. ':tok:' .. id, ARGV[i + 3]
    local known = call('APPEND', journal, tokens) - #tokens
    if known ~= offset then
      call('SET', journal, string.sub(call('GET', journal), 1, known))
      if known < offset then
        local queue, _, lease = load_queue(), held(owner, id)
        requeue(queue, owner, id, lease)
        save(queue)
        lost[#lost + 1] = id
      else
        -- Tokens that are there already are written over with themselves.
        call('SETRANGE', journal, offset, tokens)
      end
    end
  end
end
return lost
