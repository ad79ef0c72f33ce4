find /usr/bin /etc -printf '%p %s %m %u %g %y %l\n' | grep -vE '^/etc/(hosts|hostname|resolv.conf) ' | sort | sha256sum
find /usr -xdev -type f -size +1M | wc -l
