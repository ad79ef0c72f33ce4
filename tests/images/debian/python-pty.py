import os
import pty

pid, fd = pty.fork()
if pid == 0:
    os.execvp("sh", ["sh", "-c", "tty >/dev/null && echo terminal; read x; echo got $x"])
os.write(fd, b"typed\n")
out = b""
try:
    while b := os.read(fd, 1000):
        out += b
except OSError as e:
    print(e.errno)
print(sorted(out.split()))
print(os.waitpid(pid, 0)[1])
