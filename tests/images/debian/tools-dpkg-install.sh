cd /tmp
mkdir -p p/DEBIAN p/opt/thing
printf 'Package: thing\nVersion: 1.2\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: thing\n' >p/DEBIAN/control
printf '#!/bin/sh\necho configured $1\n' >p/DEBIAN/postinst
chmod 755 p/DEBIAN/postinst
echo content >p/opt/thing/file
dpkg-deb --root-owner-group -b p thing.deb >/dev/null
dpkg -i thing.deb | tail -n 1
cat /opt/thing/file
dpkg -s thing | grep -E 'Status|Version'
dpkg -P thing >/dev/null
ls /opt
