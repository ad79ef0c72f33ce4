cd /tmp
(flock 9; sleep 0.3; echo first) 9>l & sleep 0.1
(flock -n 9 || echo busy) 9>l
(flock 9; echo second) 9>l
wait
