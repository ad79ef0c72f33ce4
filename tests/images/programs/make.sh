# make -j4 with gcc, then a static program by musl-gcc.
D=$(mktemp -d); cd $D; for i in $(seq 24); do echo "#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int f$i(int x){char b[64];snprintf(b,64,\"%d\",x+$i);return atoi(b)+strlen(b);}" > f$i.c; done
(for i in $(seq 24); do echo "int f$i(int);"; done; echo '#include <stdio.h>'; echo 'int main(){int s=0;'; for i in $(seq 24); do echo "s+=f$i(s);"; done; echo 'printf("%d\n",s);return 0;}') > main.c
printf 'OBJS=$(patsubst %%.c,%%.o,$(wildcard *.c))\nprog: $(OBJS)\n\tgcc -o $@ $^\n%%.o: %%.c\n\tgcc -O2 -c -o $@ $<\n' > Makefile
make -s -j4 && ./prog; make | tail -1
musl-gcc -static -O2 -o m main.c f*.c && ./m && ldd ./m 2>&1 | tail -1; rm -rf $D
