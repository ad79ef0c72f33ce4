$SIG{ALRM} = sub { die "alarm\n" }; eval { alarm 1; select undef, undef, undef, 5 }; print $@;
$SIG{CHLD} = sub { print "chld\n" }; if (!fork) { exit 0 } select undef, undef, undef, 3; wait; kill USR1 => $$ if $SIG{USR1} = sub { print "usr1\n" };
