trap 'echo usr' USR1
trap 'echo exit' EXIT
kill -USR1 $$
(trap 'echo inner' EXIT)
trap 'echo err $?' ERR
false
