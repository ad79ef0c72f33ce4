import multiprocessing as mp
import os


def f(x):
    return x * x


def g(c, lock, v):
    with lock:
        v.value += 1
    c.send(os.getppid() > 0)
    c.close()


for method in ("fork", "spawn", "forkserver"):
    m = mp.get_context(method)
    if __name__ == "__main__":
        if method == "fork":
            with m.Pool(4) as p:
                print(sum(p.map(f, range(500))))
            a, b = m.Pipe()
            lock, v = m.Lock(), m.Value("i", 0)
            ps = [m.Process(target=g, args=(b, lock, v)) for _ in range(6)]
            [p.start() for p in ps]
            print([a.recv() for _ in ps])
            [p.join() for p in ps]
            print(v.value, [p.exitcode for p in ps])
            q = m.Queue()
            p = m.Process(target=q.put, args=("x" * 200000,))
            p.start()
            print(len(q.get()))
            p.join()
            from multiprocessing import shared_memory as s

            x = s.SharedMemory(create=True, size=4096)
            x.buf[0] = 7
            y = s.SharedMemory(x.name)
            print(y.buf[0])
            y.close()
            x.close()
            x.unlink()
        else:
            p = m.Process(target=print, args=(method,))
            p.start()
            p.join()
            print(p.exitcode)
