"""Is a name server for one question: asks the forwarder at the first port, answers it at the second, prints what came back.

The zone "signed" has a key and signatures of the right shape; they are not valid."""
import hashlib
import socket
import struct
import sys

A, SOA, SRV, OPT, DS, RRSIG, DNSKEY = 1, 6, 33, 41, 43, 46, 48
KEY = struct.pack(">HBB", 257, 3, 8) + b"\x03\x01\x00\x01" + bytes(range(1, 129))


def name(text):
    return b"".join(bytes([len(part)]) + part.encode() for part in text.split(".") if part) + b"\0"


def record(owner, kind, data):
    return owner + struct.pack(">HHIH", kind, 1, 60, len(data)) + data


def labels(owner):
    count, at = 0, 0
    while owner[at]:
        count, at = count + 1, at + owner[at] + 1
    return count


def tag():
    total = sum(byte if at & 1 else byte << 8 for at, byte in enumerate(KEY))
    return (total + (total >> 16)) & 0xFFFF


def signature(owner, kind, signer):
    fixed = struct.pack(">HBBIIIH", kind, 8, labels(owner), 60, 0xF0000000, 0, tag())
    return record(owner, RRSIG, fixed + name(signer) + bytes(128))


def answer(question):
    """The answer to a query, and how many records it has."""
    end = 12
    while question[end]:
        end += question[end] + 1
    owner, kind = question[12 : end + 1], struct.unpack(">H", question[end + 1 : end + 3])[0]
    signed = owner.endswith(name("signed"))
    records = []
    if kind == A:
        records.append(record(owner, A, bytes([10, 0, 0, 2])))
    elif kind == SRV:
        records.append(record(owner, SRV, struct.pack(">HHH", 1, 2, 3) + name("target.test")))
    elif kind == DNSKEY:
        records.append(record(owner, DNSKEY, KEY))
    if signed and records:
        records.append(signature(owner, kind, "signed"))
    head = question[:2] + struct.pack(">HHHHH", 0x8580, 1, len(records), 0, 1)
    option = b"\0" + struct.pack(">HHIH", OPT, 4096, 0x8000 if signed else 0, 0)
    return head + question[12 : end + 5] + b"".join(records) + option


if sys.argv[1] == "anchor":
    print(f"trust-anchor=signed,{tag()},8,2,{hashlib.sha256(name('signed') + KEY).hexdigest().upper()}")
    sys.exit()
forwarder, own, asked, kind = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
    server.bind(("127.0.0.1", own))
    server.settimeout(2)
    client.settimeout(3)
    option = b"\0" + struct.pack(">HHIH", OPT, 4096, 0x8000, 0)
    client.sendto(b"\x12\x34\x01\x00\0\1\0\0\0\0\0\1" + name(asked) + struct.pack(">HH", kind, 1) + option, ("127.0.0.1", forwarder))
    try:
        while True:
            question, sender = server.recvfrom(4096)
            server.sendto(answer(question), sender)
    except TimeoutError:
        pass
    try:
        print(client.recv(4096).hex())
    except TimeoutError:
        print("no answer")
