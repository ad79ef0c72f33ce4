# nginx with two workers under ab, reloaded and stopped.
report() { if [ "$TIME" ]; then sed -n "s/^Requests.*[^:]*: *\([0-9]*\).*/figure $1, req\/s: \1/p"; else grep -E "Failed|Complete"; fi; }
D=$(mktemp -d); chmod 755 $D; mkdir $D/www $D/l; echo '<h1>hello</h1>' > $D/www/index.html; head -c 100000 /dev/zero | tr '\0' x > $D/www/big
cat > $D/n.conf <<N
user www-data; worker_processes 2; error_log $D/l/error.log; pid $D/l/pid; daemon on;
events { worker_connections 512; }
http { access_log $D/l/access.log; sendfile on; tcp_nopush on; server { listen 8099; root $D/www; } }
N
nginx -c $D/n.conf && sleep 0.5 && curl -s http://127.0.0.1:8099/; curl -s http://127.0.0.1:8099/big | md5sum
ab -q -n ${N:-1000} -c 20 http://127.0.0.1:8099/ | report "2 workers, ab -c 20, a connection a request"
ab -q -k -n ${N:-1000} -c 20 http://127.0.0.1:8099/ | report "2 workers, ab -k -c 20"
[ "$TIME" ] && wrk -c 20 -t 2 -d 2 http://127.0.0.1:8099/big | report "wrk, 100 kB by sendfile"
nginx -c $D/n.conf -s reload 2>/dev/null; sleep 0.5; curl -s http://127.0.0.1:8099/; nginx -c $D/n.conf -s quit 2>/dev/null; sleep 0.7
grep -v notice $D/l/error.log; ls $D/l; [ "$TIME" ] || grep -c . $D/l/access.log
