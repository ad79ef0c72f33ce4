use Socket; socketpair(my $a, my $b, AF_UNIX, SOCK_STREAM, 0); if (!fork) { close $a; print $b scalar reverse <$b>; exit }
close $b; syswrite $a, "hello\n"; shutdown $a, 1; print <$a>, "\n"; wait;
