# needs: /bin/bash (bash)
# Functions, arrays, traps, pipelines, subshells, here documents, arithmetic, signals.
cat > script <<'END'
set -u
fib() { (( $1 < 2 )) && { echo $1; return; }; echo $(( $(fib $(($1-1))) + $(fib $(($1-2))) )); }
fib 8
declare -A map; for i in {1..500}; do map[k$i]=$((i*i)); done; echo ${#map[@]} ${map[k77]}
trap 'echo got usr1' USR1; kill -USR1 $$; 
trap 'echo at exit' EXIT
for i in {1..50}; do echo $i; done | while read n; do ((n % 7)) || echo -n "$n "; done; echo
x=$(printf '%s\n' c b a | sort | tr '\n' ' '); echo "$x"
[[ "abc123" =~ ([a-z]+)([0-9]+) ]] && echo "${BASH_REMATCH[2]}"
cat <<<"here"
( sleep 0.05; echo late ) & wait; echo "$?"
s=; for ((i=0;i<3000;i++)); do s+=$((i%10)); done; echo ${#s} ${s:100:5}
coproc cat; echo coprocess >&${COPROC[1]}; read -u ${COPROC[0]} line; echo $line
exit 9
END
$RUN bash script || echo "ended with $?"
