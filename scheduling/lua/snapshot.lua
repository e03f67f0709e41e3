-- -> {meta, by priority, by tenant, running, depth, {oldest id, its arrival}}
return {
  call('HGETALL', META), call('HGETALL', Q .. ':by_priority'), call('HGETALL', Q .. ':by_tenant'),
  call('HLEN', RUNNING), call('HLEN', WAITING), call('ZRANGE', Q .. ':arrivals', 0, 0, 'WITHSCORES'),
}
