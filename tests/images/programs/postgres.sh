# PostgreSQL as its own user: initdb, start, pgbench, parallel workers, stop.
report() { if [ "$TIME" ]; then sed -n "s/^tps = \([0-9]*\).*/figure pgbench -c 4 -j 2$1, tps: \1/p"; else grep failed; fi; }
D=$(mktemp -d); chown postgres $D; B=$(echo /usr/lib/postgresql/*/bin); cd $D
su(){ setpriv --reuid=postgres --regid=postgres --clear-groups "$@"; }
export PGHOST=$D PGPORT=5544 LC_ALL=C.UTF-8 HOME=$D
su $B/initdb -D $D/data -A trust >i.log 2>&1 || tail i.log; echo initdb $?
su $B/pg_ctl -D $D/data -w -t 60 -o "-k $D -p 5544 -c listen_addresses=127.0.0.1" -l $D/log start > s.log || { tail s.log; cat $D/log; }; 
su $B/psql -X postgres -Atc "select 6*7; create table a as select generate_series(1,10000) i; select sum(i) from a;"
su $B/pgbench -i -s 1 postgres > b.log 2>&1; tail -1 b.log | sed 's/[0-9.]* s//g'
su $B/pgbench -T ${T:-2} -c 4 -j 2 postgres 2>/dev/null | report ", Unix socket"
su $B/pgbench -T ${T:-2} -S -c 4 -j 2 -h 127.0.0.1 postgres 2>/dev/null | report " -S, TCP"
su $B/psql -X -h 127.0.0.1 postgres -Atc "set max_parallel_workers_per_gather=2; set min_parallel_table_scan_size=0; set parallel_setup_cost=0; set parallel_tuple_cost=0; explain (costs off) select count(*) from pgbench_accounts; select count(*) from pgbench_accounts"
su $B/pg_ctl -D $D/data -m fast -w stop | tail -1; grep -E "PANIC|FATAL|ERROR" $D/log; rm -rf $D
