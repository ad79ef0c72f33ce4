#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# A server under its usual client, 50 connections over loopback: servers.sh NAME PORT SCRATCH-DIRECTORY prints one figure
# as a line of JSON, ns a request.
name=$1 port=$2 dir=$3
export LC_ALL=C

fail() {
	printf '{"name": "%s", "error": "%s"}\n' "$name" "$1"
	exit 1
}

redis() {	# REQUESTS [OPTION...]
	requests=$1
	shift
	redis-server --port "$port" --bind 127.0.0.1 --save '' --dir "$dir" --loglevel warning >&2 &
	until redis-cli -p "$port" ping >/dev/null 2>&1; do
		kill -0 $! 2>/dev/null || fail "redis-server ended"
		sleep 0.02
	done
	redis-benchmark -p "$port" -c 50 -n "$requests" -t set,get --csv "$@" >"$dir/redis.csv" || fail "redis-benchmark failed"
	redis-cli -p "$port" shutdown nosave >/dev/null 2>&1
	wait $!
	# "SET","81632.66",...: the mean time of the two kinds
	awk -F'"' -v name="$name" '$2 == "SET" || $2 == "GET" { ns += 1e9 / $4; kinds++ }
		END { if (kinds != 2) exit 1; printf "{\"name\": \"%s\", \"ns\": %.1f}\n", name, ns / kinds }' "$dir/redis.csv" ||
		fail "redis-benchmark printed no figures"
}

nginx_wrk() {
	rm -f "$dir/nginx.pid"
	mkdir -p "$dir/pages"
	head -c 612 /dev/zero | tr '\0' x >"$dir/pages/index.html"
	cat >"$dir/wrk.conf" <<-END
		daemon off; master_process off; pid $dir/nginx.pid; error_log stderr crit; events { worker_connections 128; }
		http { access_log off; client_body_temp_path $dir/b; proxy_temp_path $dir/p; fastcgi_temp_path $dir/f;
		uwsgi_temp_path $dir/u; scgi_temp_path $dir/s; keepalive_requests 10000000;
		server { listen 127.0.0.1:$port; root $dir/pages; index index.html; } }
	END
	nginx -c "$dir/wrk.conf" -e stderr &
	until [ -s "$dir/nginx.pid" ]; do
		kill -0 $! 2>/dev/null || fail "nginx ended"
		sleep 0.02
	done
	wrk -t1 -c50 -d1 "http://127.0.0.1:$port/index.html" >"$dir/wrk.txt" || fail "wrk failed"
	kill $!
	wait $!
	grep -E 'Socket errors|Non-2xx' "$dir/wrk.txt" >&2 && fail "wrk saw errors"
	awk -v name="$name" '/^Requests\/sec:/ && $2 > 0 { printf "{\"name\": \"%s\", \"ns\": %.1f}\n", name, 1e9 / $2; found = 1 }
		END { exit !found }' "$dir/wrk.txt" || fail "wrk printed no figure"
}

case $name in
redis-50) redis 3000 ;;
redis-pipe) redis 30000 -P 16 ;;
nginx-wrk) nginx_wrk ;;
*) fail "no such figure" ;;
esac
