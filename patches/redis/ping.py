"""Sends a Redis cluster node, at the port that is given, a PING from a node that it does not know."""
import socket
import struct
import sys

LENGTH = 2256
packet = b"RCmb" + struct.pack(">IHHHH", LENGTH, 1, 0, 0, 0)
packet += bytes(LENGTH - len(packet))
with socket.create_connection(("127.0.0.1", int(sys.argv[1])), 5) as node:
    node.sendall(packet)
    node.settimeout(1)
    try:
        print(len(node.recv(4096)), "bytes of an answer")
    except TimeoutError:
        print("no answer")
