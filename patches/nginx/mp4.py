"""Writes a small MP4 file: one track, four chunks of two samples, a second each. Enough for nginx to cut."""
import struct
import sys


def atom(name, *parts):
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), name) + body


def words(*numbers):
    return struct.pack(">%dI" % len(numbers), *numbers)


SAMPLES, SIZE, SCALE = 8, 64, 1000
head = atom(b"ftyp", b"isom", words(0), b"isommp41")


def moov(offset):
    stbl = atom(
        b"stbl",
        atom(b"stsd", words(0, 1), atom(b"mp4v", bytes(78))),
        atom(b"stts", words(0, 2, 4, SCALE, 4, SCALE)),
        atom(b"stss", words(0, 2, 1, 5)),
        atom(b"ctts", words(0, 2, 4, 10, 4, 20)),
        atom(b"stsc", words(0, 2, 1, 2, 1, 3, 2, 1)),
        atom(b"stsz", words(0, 0, SAMPLES, *[SIZE] * SAMPLES)),
        atom(b"stco", words(0, 4, *[offset + 2 * SIZE * n for n in range(4)])),
    )
    mdhd = atom(b"mdhd", words(0, 0, 0, SCALE, SAMPLES * SCALE, 0))
    hdlr = atom(b"hdlr", words(0, 0), b"vide", words(0, 0, 0), b"\0")
    minf = atom(b"minf", atom(b"vmhd", words(1, 0, 0)), atom(b"dinf", atom(b"dref", words(0, 0))), stbl)
    tkhd = atom(b"tkhd", words(7, 0, 0, 1, 0, SAMPLES * SCALE), bytes(60))
    mvhd = atom(b"mvhd", words(0, 0, 0, SCALE, SAMPLES * SCALE), bytes(80))
    return atom(b"moov", mvhd, atom(b"trak", tkhd, atom(b"mdia", mdhd, hdlr, minf)))


index = moov(0)
index = moov(len(head) + len(index) + 8)
sys.stdout.buffer.write(head + index + atom(b"mdat", bytes(range(256)) * (SAMPLES * SIZE // 256)))
