date -u -d @86400 +%c
TZ=Asia/Tokyo date -d @0 +%H
LC_ALL=C.UTF-8 printf 'ü' | wc -m
getconf PAGESIZE
cal 2>&1 | wc -c
