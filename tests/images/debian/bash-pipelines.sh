set -o pipefail
seq 1 3000 | grep -v 7 | sort -rn | tee >(wc -l >&2) 2>/dev/null | head -n 2
false | true
echo $? ${PIPESTATUS[*]}
