cd /tmp
seq 100 | split -l 30 - p
cat p* | md5sum
wc p*
seq 9 | shuf --random-source=/etc/passwd | sort | tr '\n' ' '
join <(seq 3) <(seq 2 4)
comm -12 <(seq 3) <(seq 2 4)
cut -c2 <<<abc
od -An -tx1 <<<ab
fold -w3 <<<abcdef
tac <(seq 3)
