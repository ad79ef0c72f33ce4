cd /tmp
sqlite3 db 'pragma journal_mode=wal; create table t(a int, b text); with recursive n(i) as (select 1 union all select i+1 from n where i<5000) insert into t select i, hex(i*7) from n; select count(*), sum(a) from t; pragma integrity_check;'
ls db*
