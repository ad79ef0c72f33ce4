my %h; $h{$_ % 97} += $_ for 1..200000; print "$_=$h{$_}\n" for (sort { $a <=> $b } keys %h)[0..3]; 
