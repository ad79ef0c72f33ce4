# sqlite3: a write-ahead log, then four writers at once.
D=$(mktemp -d); cd $D; cat > a.sql <<'Q'
pragma journal_mode=wal; create table t(a integer primary key,b text); 
with recursive c(x) as (select 1 union all select x+1 from c where x<20000) insert into t select x,hex(x*7919) from c;
create index i on t(b); select count(*),sum(a) from t where b like '3%'; update t set b=b||'x' where a%3=0; select max(b) from t; vacuum; pragma integrity_check;
Q
sqlite3 x.db < a.sql; for i in 1 2 3 4; do (for j in $(seq 20); do sqlite3 -cmd '.timeout 20000' x.db "insert into t(b) values('p$i-$j')"; done) & done; wait; sqlite3 x.db "select count(*) from t"; rm -rf $D
