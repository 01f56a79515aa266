# needs: /usr/bin/sort (coreutils)
# Small programs of all kinds.
seq 1 2000 > numbers
$RUN sort -rn numbers | head -3
$RUN cksum numbers
$RUN wc numbers
$RUN tac numbers | $RUN tail -2
$RUN od -An -tx1 -N 32 numbers
$RUN sha256sum numbers
$RUN md5sum numbers
$RUN b2sum numbers
$RUN base64 numbers | $RUN base64 -d | cksum
$RUN cut -c1-2 numbers | $RUN sort | $RUN uniq -c | tail -2
$RUN tr 0-9 a-j < numbers | tail -1
$RUN factor 18446744073709551557 1234567890
$RUN expr 12 '*' 12
$RUN date -u -d @1000000000
$RUN printf '%s %5.2f %x\n' word 3.14159 255
mkdir -p dir/a/b && $RUN cp -r dir copy && $RUN ls -R copy
$RUN ln -s numbers link && $RUN readlink link
$RUN stat -c '%s %F' numbers
$RUN join numbers numbers | wc -l
$RUN split -n 4 numbers part. && cat part.* | cksum
$RUN dd if=numbers bs=512 2>/dev/null | cksum
$RUN comm -12 numbers numbers 2>/dev/null | wc -l
$RUN paste numbers numbers | tail -1
$RUN fmt -w 60 numbers | tail -1
$RUN numfmt --to=iec 123456789
$RUN false || echo "false: $?"
$RUN test -d dir && echo directory
$RUN timeout 0.2 sleep 10 || echo "timeout: $?"
$RUN sh -c 'exit 77' || echo "exit: $?"
$RUN sh -c 'kill -TERM $$' || echo "signal: $?"
$RUN env -i A=b env
$RUN nonexistent-program 2>/dev/null || echo "missing: $?"
