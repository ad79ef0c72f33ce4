use File::Temp "tempfile"; use Fcntl ":flock"; my ($h, $n) = tempfile(); print $h "x\n" x 1000; close $h; print -s $n, "\n";
open my $f, "+<", $n; flock $f, LOCK_EX; seek $f, 10, 0; read $f, my $b, 4; print unpack("H*", $b), "\n"; truncate $f, 5; print -s $f, "\n";
opendir my $d, "/etc"; print scalar(grep /passwd/, readdir $d) > 0, "\n"; unlink $n; print -e $n ? 1 : 0, "\n"; print join(" ", (stat "/etc/passwd")[2, 3, 7]), "\n";
