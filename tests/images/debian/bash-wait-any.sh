sleep 1 & (sleep 0.2; exit 3) & wait -n
echo $?
wait
echo $?
jobs
