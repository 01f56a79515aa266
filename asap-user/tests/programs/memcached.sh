# needs: /usr/bin/memcached (memcached) /usr/bin/python3 (python3-minimal)
$RUN memcached -l 127.0.0.1 -p "$PORT" -U 0 -u nobody -m 64 -t 4 & server=$!
cat > client.py <<'END'
import os, socket, time
for _ in range(200):
    try:
        s = socket.create_connection(("127.0.0.1", int(os.environ["PORT"]))); break
    except OSError: time.sleep(0.05)
f = s.makefile("rwb")
def ask(line, data=None):
    f.write(line.encode() + b"\r\n" + (data + b"\r\n" if data is not None else b"")); f.flush()
    return f.readline().decode().strip()
for i in range(3000):
    assert ask(f"set key{i} 0 0 {len(str(i))}", str(i).encode()) == "STORED"
total = 0
for i in range(3000):
    head = ask(f"get key{i}"); total += int(f.readline()); assert f.readline() == b"END\r\n"
print(total, ask("incr key7 35"), ask("delete key7"), ask("delete key7"), ask("nonsense"))
print(ask("set big 0 0 500000", b"x" * 500000), ask("flush_all"))
END
/usr/bin/python3 client.py
kill -TERM $server; wait $server; echo "ended with $?"
