# needs: /usr/bin/redis-server (redis-server) /usr/bin/redis-benchmark (redis-tools)
$RUN redis-server --bind 127.0.0.1 --port "$PORT" --save '' --appendonly no --dir "$PWD" --logfile "$PWD/log" & server=$!
ask() { redis-cli -p "$PORT" "$@"; }
until ask ping > /dev/null 2>&1; do kill -0 $server; sleep 0.1; done
redis-benchmark -p "$PORT" -n 3000 -c 20 -q -t set,get,incr,lpush,rpop,sadd,hset,zadd,lrange_100,mset > bench.txt && echo benchmark done
ask set key value; ask append key s; ask strlen key
ask eval 'local s = 0 for i = 1, 1000 do s = s + i end return s' 0
ask eval 'return redis.call("incrby", KEYS[1], ARGV[1])' 1 number 41
ask rpush list c b a; ask sort list alpha; ask zadd board 1 one 2 two; ask zrange board 0 -1 withscores
ask pfadd visits a b c d e; ask pfcount visits; ask setbit bits 100 1; ask bitcount bits
ask multi; ask debug jmap; ask object encoding list
ask bgsave > /dev/null; sleep 0.5; ask lastsave > /dev/null; test -s dump.rdb && echo saved
ask shutdown nosave; wait $server; echo "ended with $?"
