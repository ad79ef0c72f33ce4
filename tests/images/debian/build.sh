set -e; mkdir -p /tmp/b && cd /tmp/b
for i in $(seq 8); do printf '#include <stdio.h>\nint f%d(int x) { return x * %d; }\n' $i $i >f$i.c; done
{ for i in $(seq 8); do echo "int f$i(int);"; done; echo '#include <stdio.h>'; echo 'int main(void) { int n = 0;'
for i in $(seq 8); do echo "n += f$i($i);"; done; echo 'printf("%d\n", n); return 0; }'; } >main.c
cat >Makefile <<'E'
OBJECTS = main.o $(patsubst %,f%.o,1 2 3 4 5 6 7 8)
prog: $(OBJECTS) libx.so
	gcc -o $@ $(OBJECTS) -L. -lx -Wl,-rpath,'$$ORIGIN'
libx.so: f1.c
	gcc -shared -fPIC -o $@ $<
%.o: %.c
	gcc -O1 -g -c -o $@ $<
clean:
	rm -f *.o prog
E
make -s -j4; ./prog; make -s -j4; touch f3.c; make -j4 | sort; make -s clean; ls | tr '\n' ' '
gcc -static -o s -x c - <<<'#include <math.h>
int main(void) { return 7; }'; set +e; ./s; echo $?
