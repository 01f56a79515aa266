"""Is a Redis master for one replica: the server at the first port, told to follow the second. Gives it an empty data set."""
import socket
import sys

EMPTY = bytes.fromhex("524544495330303039ff0000000000000000")
server, own = int(sys.argv[1]), int(sys.argv[2])


def tell(words):
    with socket.create_connection(("127.0.0.1", server), 5) as client:
        client.sendall(words.encode() + b"\r\n")
        return client.recv(4096)


with socket.create_server(("127.0.0.1", own)) as listener:
    listener.settimeout(10)
    tell(f"REPLICAOF 127.0.0.1 {own}")
    replica, _ = listener.accept()
    replica.settimeout(5)
    while True:
        words = replica.recv(4096)
        if b"PING" in words:
            replica.sendall(b"+PONG\r\n")
        elif b"PSYNC" in words:
            replica.sendall(b"+FULLRESYNC " + b"0" * 40 + b" 0\r\n$%d\r\n" % len(EMPTY) + EMPTY)
            break
        else:
            replica.sendall(b"+OK\r\n" * max(1, words.count(b"REPLCONF")))
    replica.settimeout(2)
    try:
        replica.recv(4096)
    except TimeoutError:
        pass
    print(tell("REPLICAOF NO ONE").decode().strip())
    replica.close()
