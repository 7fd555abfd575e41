"""PNG and TIFF files assembled byte by byte, for what no library writes."""

import struct
import zlib

import numpy as np

TIFF_TYPES = {1: "B", 2: "B", 3: "H", 4: "I", 7: "B", 8: "h", 11: "f"}


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def packed(values, bits):
    """The bytes of each row of numbers of so many bits, filled up with zeros to whole bytes."""
    for row in np.asarray(values).reshape(len(values), -1):
        digits = "".join(format(int(number), f"0{bits}b") for number in row)
        digits += "0" * (-len(digits) % 8)
        yield int(digits, 2).to_bytes(len(digits) // 8, "big")


def png(colours, bits, values, *chunks, after=()):
    """A PNG of numbers of so many bits; colours: 0 grey, 2 RGB, 3 palette; chunks before its pixels, and after."""
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, colours, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in packed(values, bits)))
    parts = [chunk(b"IHDR", head), *chunks, chunk(b"IDAT", pixels), *after, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(planes, size, tags, order="<", compressed=False):
    """A TIFF of one strip, or one for each plane of bytes, with these tags: {number: (type, values)}."""
    strips = [zlib.compress(plane) if compressed else plane for plane in planes]
    rows, columns = size
    own = {256: (4, [columns]), 257: (4, [rows]), 259: (3, [8 if compressed else 1]), 278: (4, [rows])}
    own |= {273: (4, [0] * len(strips)), 279: (4, [len(strip) for strip in strips])} | tags
    beside = 8 + 2 + 12 * len(own) + 4
    lengths = [len(values) * struct.calcsize(TIFF_TYPES[kind]) for kind, values in own.values()]
    at = beside + sum(length + length % 2 for length in lengths if length > 4)
    own[273] = 4, [at + sum(map(len, strips[:number])) for number in range(len(strips))]
    directory, far = b"", b""
    for number, (kind, values) in sorted(own.items()):
        data = struct.pack(f"{order}{len(values)}{TIFF_TYPES[kind]}", *values)
        place = data.ljust(4, b"\0") if len(data) <= 4 else struct.pack(order + "I", beside + len(far))
        far += data + bytes(len(data) % 2) if len(data) > 4 else b""
        directory += struct.pack(order + "HHI", number, kind, len(values)) + place
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(own))
    return head + directory + bytes(4) + far + b"".join(strips)


def grey_tiff(values, bits, sample_format=1, white_is_zero=False, order="<", compressed=False, tags=None):
    """A TIFF of greys, (H, W); sample_format: 1 unsigned, 2 signed, 3 floats; white_is_zero: None to leave it out."""
    kind = {1: "u", 2: "i", 3: "f"}[sample_format]
    whole = bits in (8, 16, 32)
    data = values.astype(f"{order}{kind}{bits // 8}").tobytes() if whole else b"".join(packed(values, bits))
    own = {258: (3, [bits]), 339: (3, [sample_format])} | (tags or {})
    own |= {} if white_is_zero is None else {262: (3, [0 if white_is_zero else 1])}
    return tiff([data], values.shape, own, order, compressed)
