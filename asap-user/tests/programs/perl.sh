# needs: /usr/bin/perl (perl-base)
cat > script.pl <<'END'
use strict; use warnings;
my %h; $h{$_ % 97} += $_ for 1..50000; print join(",", map { "$_=$h{$_}" } (sort { $a <=> $b } keys %h)[0..4]), "\n";
my $text = "the quick brown fox " x 2000; my $n = () = $text =~ /\b(\w)(\w*)\b/g; print "$n\n";
sub fact { my $n = shift; $n < 2 ? 1 : $n * fact($n - 1) } print fact(20), "\n";
eval { die { code => 7 } }; print $@->{code}, "\n";
local $SIG{USR1} = sub { print "usr1\n" }; kill USR1 => $$;
my $pid = fork // die; if (!$pid) { exit 3 } waitpid $pid, 0; print $? >> 8, "\n";
my @s = sort { $b <=> $a } map { ($_ * 7919) % 10007 } 1..20000; print "@s[0..3]\n";
print scalar reverse("hello"), " ", sprintf("%.6f", atan2(1,1)*4), "\n"; $text =~ s/(\w+) (\w+)/$2 $1/g; print substr($text, 0, 20), "\n";
exit 6;
END
$RUN perl script.pl || echo "ended with $?"
