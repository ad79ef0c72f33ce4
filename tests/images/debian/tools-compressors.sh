cd /tmp
seq 1 200000 >s
for z in gzip xz; do $z -k s; ls -s s.* >/dev/null; $z -dc s.* | sha256sum; rm s.*; done
