# redis-server under redis-benchmark: 50 clients, one by one and in pipelines; snapshots by fork.
report() { if [ "$TIME" ]; then tr '\r' '\n' | sed -n "s/^\([A-Z]*\): \([0-9]*\).* requests per second.*/figure redis-benchmark -c 50$1, \1, req\/s: \2/p"; else tr '\r' '\n' | grep -c "requests per second, p50"; fi; }
cd $(mktemp -d)
redis-server --port 6399 --save "" --appendonly no --daemonize no > log 2>&1 &
R=$!
for i in $(seq 100); do redis-cli -p 6399 ping 2>/dev/null | grep -q PONG && break; sleep 0.1; done
redis-cli -p 6399 set foo bar; redis-cli -p 6399 get foo; redis-cli -p 6399 info server | grep -c redis_version
redis-benchmark -p 6399 -t set,get -n ${N:-2000} -c 50 -q | report
redis-benchmark -p 6399 -t set,get -n ${N:-2000} -c 50 -P 16 -q | report " -P 16"
redis-cli -p 6399 eval 'return redis.call("get","foo")' 0
redis-cli -p 6399 bgsave; sleep 1; redis-cli -p 6399 lastsave | grep -c . ; ls dump.rdb
redis-cli -p 6399 shutdown nosave; wait $R; echo rc $?
