sleep 9 & ps -o pid,ppid,stat,args | tail -n +2 | awk '{print NF > 3}'
pgrep -c sleep
pkill sleep
wait $!
echo $?
ps -p 1 -o pid= | tr -d ' '
cat /proc/self/comm
tr '\0' ' ' </proc/self/cmdline
