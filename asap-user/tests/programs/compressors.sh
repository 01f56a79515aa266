# needs: /usr/bin/xz (xz-utils) /usr/bin/zstd (zstd) /usr/bin/bzip2 (bzip2)
# Round trips. What comes out is compared with what went in, and its sum is told.
seq 1 60000 > in; head -c 300000 /bin/bash >> in
for program in "gzip -n" bzip2 xz "zstd -q" "xz -T2 -0" "zstd -q -T2 -9"; do
    $RUN $program -c in > packed && $RUN ${program%% *} -dc packed > out && cmp in out && cksum < packed
done
head -c 100 packed > broken; $RUN zstd -q -dc broken > /dev/null 2>&1 || echo "broken: $?"
$RUN gzip -t in 2>/dev/null || echo "no gzip: $?"
$RUN tar -cf - in | $RUN tar -tf -
