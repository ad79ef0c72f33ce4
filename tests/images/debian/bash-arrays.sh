a=(one 'two words' three)
a[7]=x
echo ${#a[@]} ${!a[@]}
declare -A m=([k]=v [q]=w)
echo ${m[k]}${m[q]}
mapfile -t l < <(seq 3)
echo ${l[2]}
echo ${a[@]:1:2} ${a[1]//o/0}
