-- name, value expected ('' is none), new value ('' deletes), seconds to live -> '' where it was swapped, else the value
local key = Q .. ':' .. ARGV[1]
local value = call('GET', key) or ''
if value ~= ARGV[2] then return value end
if ARGV[3] == '' then
  call('DEL', key)
else
  call('SET', key, ARGV[3], 'EX', ARGV[4])
end
return ''
