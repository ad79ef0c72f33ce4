sleep 0.3 & (exit 3) & wait -n
echo $?
wait
echo $?
jobs
