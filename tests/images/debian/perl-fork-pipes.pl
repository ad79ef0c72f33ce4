$| = 1; my @kids; for my $i (1..5) { pipe(my $r, my $w); if (!(my $p = fork)) { close $r; print $w "child $i\n"; exit $i }
else { close $w; print scalar <$r>; waitpid $p, 0; print $? >> 8, "\n" } }
open my $s, "-|", "echo from shell" or die; print <$s>; close $s; open $s, "|-", "tr a-z A-Z"; print $s "upper\n"; close $s;
print `uname -s`; system("exit 3"); print $? >> 8, "\n";
