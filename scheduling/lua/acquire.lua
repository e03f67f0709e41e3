-- request id, rpm, tpm, concurrency ('' is no limit), tokens of all, now, tokens a day, ids of further answers to it...
--   -> {reason, retry after, requests left, tokens left, seconds until full, seconds until full}
-- :buckets holds level, time, size and beginning of `requests` and `tokens`; :running is request ids by the time they took
-- their slot; :day the day (UTC, since 1970), the tokens charged on it, and since when. Who took a slot before a limit
-- began was not charged for it, and is given nothing back.
local BUCKETS_KEEP_S = 2 * 86400
local id, now, num = ARGV[1], clock(ARGV[6]), math.max(1, #ARGV - 6)
local buckets, slots = Q .. ':buckets', Q .. ':running'
local concurrency, tokens, daily = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[7])
local day, used, daily_since = math.floor(now / 86400), 0, now
if daily then
  local d = call('HMGET', Q .. ':day', 'day', 'tokens', 'since')
  if tonumber(d[1]) == day then used, daily_since = tonumber(d[2]), tonumber(d[3] or 0) end
end

local b = call('HMGET', buckets, 'requests', 'requests_s', 'tokens', 'tokens_s')

local function load_bucket(name, size, level, time)
  if not size then
    -- No limit any more: one that is set later begins anew.
    if level then call('HDEL', buckets, name) end
    return nil
  end
  local since = not level and now
  level, time = tonumber(level or size), tonumber(time or now)
  level = math.min(size, level + math.max(0, now - time) * size / 60)
  return { name = name, size = size, level = level, time = math.max(now, time), since = since }
end

local function wait(bucket, amount)
  if not bucket then return 0 end
  if bucket.size <= 0 then return 60 end
  return math.max(0, (math.min(amount, bucket.size) - bucket.level) * 60 / bucket.size)
end

local taken = {}
local function take(bucket, amount)
  if not bucket then return end
  bucket.level = bucket.level - amount
  local name = bucket.name
  for _, word in ipairs({ name, bucket.level, name .. '_s', bucket.time, name .. '_size', bucket.size }) do
    taken[#taken + 1] = word
  end
  if bucket.since then
    taken[#taken + 1] = name .. '_since'
    taken[#taken + 1] = bucket.since
  end
end

local requests = load_bucket('requests', tonumber(ARGV[2]), b[1], b[2])
local budget = load_bucket('tokens', tonumber(ARGV[3]), b[3], b[4])

local function answer(reason, retry_after)
  local function level(bucket) return bucket and tostring(math.max(0, math.floor(bucket.level))) or '' end
  local function full(bucket) return tostring(bucket and wait(bucket, bucket.size) or 0) end
  return { reason, tostring(retry_after), level(requests), level(budget), full(requests), full(budget) }
end

if call('ZSCORE', slots, id) then return answer('', 0) end
if concurrency and call('ZCARD', slots) + num > concurrency then return answer('concurrency', 1) end
if requests and requests.level < num then return answer('requests_per_minute', wait(requests, num)) end
if budget and budget.level < tokens then return answer('tokens_per_minute', wait(budget, tokens)) end
if daily and used + tokens > daily then return answer('tokens_per_day', (day + 1) * 86400 - now) end
take(requests, num)
take(budget, tokens)
if daily then
  call('HSET', Q .. ':day', 'day', day, 'tokens', used + tokens, 'since', daily_since)
  call('EXPIRE', Q .. ':day', 2 * 86400)
end
call('ZADD', slots, now, id)
for i = 8, #ARGV do call('ZADD', slots, now, ARGV[i]) end
if #taken > 0 then
  call('HSET', buckets, unpack(taken))
  -- A missing bucket means a full one, so it stays for as long as a request may run: what that used beyond its charge is
  -- owed at its end. A look costs less than a write.
  if call('TTL', buckets) < BUCKETS_KEEP_S / 2 then call('EXPIRE', buckets, BUCKETS_KEEP_S) end
end
return answer('', 0)
