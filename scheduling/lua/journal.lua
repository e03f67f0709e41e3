-- owner, (id, attempt, start, int32 bytes)... -> ids no longer held
local owner, lost = ARGV[1], {}
if #ARGV == 1 then return lost end
local ids = {}
for i = 2, #ARGV, 4 do ids[#ids + 1] = ARGV[i] end
local attempts = call('HMGET', Q .. ':own:' .. owner, unpack(ids))
for n, id in ipairs(ids) do
  local i = 4 * n - 2
  local offset = tonumber(ARGV[i + 2]) * 4
  if attempts[n] ~= ARGV[i + 1] then
    lost[#lost + 1] = id
  elseif call('STRLEN', Q .. ':tok:' .. id) < offset then
    requeue(load_queue(), id, held(owner, id))
    lost[#lost + 1] = id
  else
    -- Tokens that are there already are written over with themselves.
    call('SETRANGE', Q .. ':tok:' .. id, offset, ARGV[i + 3])
  end
end
return lost
