import mmap
import os
import tempfile

with tempfile.TemporaryFile() as f:
    f.truncate(1 << 20)
    m = mmap.mmap(f.fileno(), 0)
    m[5000:5005] = b"hello"
    m.flush()
    print(os.pread(f.fileno(), 5, 5000))
    os.pwrite(f.fileno(), b"J", 5000)
    print(m[5000:5005])
    if os.fork() == 0:
        m[0] = 65
        os._exit(0)
    os.wait()
    print(m[:1])
    f.truncate(8192)
    m.resize(8192)
    print(len(m))
    m.close()
with tempfile.TemporaryDirectory() as d:
    open(d + "/a", "w").write("x")
    os.makedirs(d + "/b/c")
    print(sorted(os.listdir(d)))
    os.symlink("a", d + "/l")
    print(os.readlink(d + "/l"))
print(os.path.exists(d))
m = mmap.mmap(-1, 8192)
pid = os.fork()
if pid == 0:
    m[:3] = b"abc"
    os._exit(0)
os.wait()
print(m[:3])
p = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE)
p[0] = 1
if os.fork() == 0:
    p[0] = 2
    os._exit(0)
os.wait()
print(p[0])
print(mmap.mmap(os.open("/etc/passwd", 0), 0, prot=mmap.PROT_READ)[:4])
