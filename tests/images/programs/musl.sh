# A program of musl's, loaded by musl's own dynamic linker, then static.
here=$(cd "$(dirname "$0")" && pwd)
cd "$(mktemp -d)"
echo 'int plus(int a, int b) { return a + b; }' > plus.c
musl-gcc -O2 -shared -fPIC -o plus.so plus.c
for how in -rdynamic -static; do
	musl-gcc -O2 -pthread $how -o program "$here/musl.c" && ./program $how
	echo status $?
done
