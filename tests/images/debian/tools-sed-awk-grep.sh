sed -n '1,3p;s/root/R/gp' /etc/passwd
awk -F: '{n += $3} END {print NR, n}' /etc/passwd
grep -c . /etc/group
cp /etc/passwd /tmp/p
sed -i s/root/toor/ /tmp/p
head -1 /tmp/p
