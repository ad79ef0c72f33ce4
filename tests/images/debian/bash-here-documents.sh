x=5; cat <<E; cat <<'E'; cat <<-E; cat <<<"$x$x"
a $x $((x * 2))
E
a $x
E
	b
E
