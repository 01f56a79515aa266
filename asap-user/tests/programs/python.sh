# needs: /usr/bin/python3 (python3-minimal)
cat > script.py <<'END'
import sys, threading, os, signal, re, json, hashlib, zlib, subprocess
def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
print(fib(20))
print(sum(hash(str(i)) * 0 + i for i in range(20000)))
class A:
    def __getattr__(self, n): return n * 2
print(A().ab, sorted({i * 7919 % 1009 for i in range(500)})[:4])
r = []
ts = [threading.Thread(target=lambda k=k: r.append(sum(range(k * 1000)))) for k in range(20)]
[t.start() for t in ts]; [t.join() for t in ts]; print(sum(r))
try:
    raise ValueError("x")
except ValueError as e:
    print(repr(e))
def gen():
    try:
        for i in range(100): yield i
    finally: print("closed")
g = gen(); next(g); g.close()
signal.signal(signal.SIGUSR1, lambda *a: print("usr1")); os.kill(os.getpid(), signal.SIGUSR1)
pid = os.fork()
if pid == 0: os._exit(5)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(subprocess.run(["echo", "child"], capture_output=True).stdout)
print(hashlib.sha256(b"a" * 100000).hexdigest()[:16], zlib.crc32(b"b" * 100000), len(zlib.compress(os.urandom(0) + b"ab" * 50000)))
print(json.loads(json.dumps({"a": [1, 2.5, None]})), re.sub(r"(\w+)@(\w+)", r"\2 at \1", "me@here you@there"))
sys.setrecursionlimit(5000)
def deep(n): return 0 if n == 0 else 1 + deep(n - 1)
print(deep(3000)); sys.exit(11)
END
$RUN /usr/bin/python3 -S script.py || echo "ended with $?"
