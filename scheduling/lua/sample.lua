-- how many -> packed entries of waiting requests, drawn at random
local entries = {}
for _, id in ipairs(call('ZRANDMEMBER', ARRIVALS, ARGV[1])) do
  entries[#entries + 1] = call('HGET', Q .. ':req:' .. id, 'entry') or nil
end
return entries
