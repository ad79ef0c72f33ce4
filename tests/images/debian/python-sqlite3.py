import os
import sqlite3

c = sqlite3.connect("/tmp/x.db")
c.execute("create table t(a integer primary key, b text)")
c.executemany("insert into t(b) values(?)", [(str(i),) for i in range(3000)])
c.commit()
print(c.execute("select count(*), sum(a) from t").fetchone())
if os.fork() == 0:
    d = sqlite3.connect("/tmp/x.db")
    d.execute("update t set b='z' where a=1")
    d.commit()
    os._exit(0)
os.wait()
print(c.execute("select b from t where a=1").fetchone())
d = sqlite3.connect("/tmp/x.db", timeout=0.1)
c.execute("begin exclusive")
try:
    d.execute("begin exclusive")
except sqlite3.OperationalError as e:
    print(e)
c.rollback()
print(c.execute("pragma integrity_check").fetchone())
