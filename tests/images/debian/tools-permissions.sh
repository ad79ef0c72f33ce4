cd /tmp
umask 027
touch f
mkdir d
stat -c %a f d
chmod u+s,g-r f
stat -c %a f
chown 1:2 f
stat -c %u:%g:%a f
setpriv --reuid 1000 --regid 1000 --clear-groups cat f 2>&1
setpriv --reuid 1000 --regid 1000 --clear-groups id
