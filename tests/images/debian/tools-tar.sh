cd /tmp
mkdir -p t/d
seq 1 20000 >t/seq
ln -s seq t/link
ln t/seq t/hard
mkfifo t/fifo; touch -d @1000000003 t/fifo
chmod 640 t/seq
touch -d @1000000000 t/d; touch -d @1000000001 t/seq; touch -h -d @1000000002 t/link
for z in '' z J; do tar c${z}f t.tar t && mkdir u && tar x${z}f t.tar -C u && (cd u; find t -printf '%p %m %n %y %l %s %T@\n' | grep -v ' d ' | sort; find t -type f | sort | xargs sha256sum); rm -r u; done
