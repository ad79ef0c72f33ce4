import subprocess

print(subprocess.run(["tr", "a-z", "A-Z"], input="x" * 100000, capture_output=True, text=True).stdout.count("X"))
print(subprocess.run("exit 9", shell=True).returncode, subprocess.run(["sh", "-c", "kill -9 $$"]).returncode)
procs = [subprocess.Popen(["sh", "-c", f"sleep 0.1; exit {i}"]) for i in range(40)]
print([p.wait() for p in procs])
try:
    subprocess.run(["sleep", "9"], timeout=0.2)
except subprocess.TimeoutExpired:
    print("timeout")
print(
    subprocess.run(["env"], env={"A": "b"}, capture_output=True, text=True, cwd="/tmp", start_new_session=True).stdout
)
try:
    subprocess.run(["/nonexistent"])
except FileNotFoundError as e:
    print(e)
