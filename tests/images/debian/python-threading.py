import queue
import threading

q, out = queue.Queue(), []


def work():
    while (n := q.get()) is not None:
        out.append(n * n)


ts = [threading.Thread(target=work) for _ in range(32)]
[t.start() for t in ts]
[q.put(i) for i in range(5000)]
[q.put(None) for _ in ts]
[t.join() for t in ts]
print(sum(out), len(out))
b = threading.Barrier(8)
got = []
ts = [threading.Thread(target=lambda: got.append(b.wait())) for _ in range(8)]
[t.start() for t in ts]
[t.join() for t in ts]
print(sorted(got))
c = threading.Condition()
with c:
    print(c.wait(0.05))
e = threading.Event()
threading.Timer(0.05, e.set).start()
print(e.wait(5))
s = threading.Semaphore(0)
print(s.acquire(timeout=0.05))
