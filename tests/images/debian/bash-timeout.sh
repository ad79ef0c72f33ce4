timeout 0.2 sleep 5
echo $?
timeout -s KILL 0.2 sleep 5
echo $?
timeout 5 true
echo $?
