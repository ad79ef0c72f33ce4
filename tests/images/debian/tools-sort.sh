seq 1 60000 | awk '{print ($1 * 7919) % 60013}' >/tmp/n
sort -n /tmp/n | sha256sum
sort -S 100k --parallel=2 /tmp/n | sha256sum
sort -u -k1.2 /tmp/n | wc -l
