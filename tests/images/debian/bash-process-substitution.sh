diff <(seq 1 5) <(seq 2 6)
paste -d: <(echo a) <(echo b)
echo through > >(tr a-z A-Z)
wait $!
sleep 0.1
