cd /tmp
install -Dm 755 /bin/true a/b/t
cp -a a c
mv c/b d
rmdir c
stat -c '%a %F %h' d d/t
ln -sr d/t l
readlink l
realpath l
truncate -s 1M s
stat -c '%s %b' s
cp --sparse=always s s2
cmp s s2
dd if=/dev/urandom of=r bs=64k count=4 status=none; cp r r2; cmp r r2; echo $?; mktemp -u XXX | wc -c; df --output=target /proc | tail -1; shred -u r2; ls
