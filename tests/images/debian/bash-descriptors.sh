exec 5>/tmp/f
echo five >&5
exec 5>&-
exec 6</tmp/f
read l <&6
echo $l
{ echo a; echo b >&2; } 2>&1 | sort
(echo x >&7) 2>&1 | wc -l
