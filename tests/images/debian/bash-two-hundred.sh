for ((i = 0; i < 200; i++)); do (sleep 0.5; exit $((i % 3))) & a+=($!); done
n=0
for p in ${a[*]}; do wait $p; ((n += $?)); done
echo $n
