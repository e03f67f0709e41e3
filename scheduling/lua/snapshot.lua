-- -> {meta, {oldest id, its arrival}}
return { call('HGETALL', META), call('ZRANGE', ARRIVALS, 0, 0, 'WITHSCORES') }
