"""What a file says beside its pixels: the little of it that is used, and a file without the rest if that is damaged.

Each format is taken apart as its standard has it: PNG (3rd edition), JPEG (ITU-T T.81), WebP (RFC 9649), GIF89a,
TIFF 6.0 and Photoshop's.
"""

import contextlib
import io
import re
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from PIL import ExifTags, Image, PngImagePlugin, TiffImagePlugin

MAX_BYTES = 10**9  # of a file that is taken into memory
MAX_TEXT = 2**24  # bytes of a text or a profile in a PNG, unpacked: a bomb has more
ADOBE_RGB = "R03"  # as the Design rule for Camera File system (DCF 2.0) marks it
# Texts in a PNG by these names Pillow takes for its own notes of the picture.
PILLOWS_NAMES = {"transparency", "interlace", "bbox", "icc_profile", "gamma", "default_image", "blend", "disposal"}
PILLOWS_NAMES |= {"exif", "srgb", "xmp"}

PNG_BEGINNING, PNG_PIXELS = b"\x89PNG\r\n\x1a\n", {b"IHDR", b"PLTE", b"IDAT", b"IEND"}
PNG_CLEAR_COLOUR = {0: 2, 2: 6}  # bytes of tRNS for greys and RGB; a palette's has one for each colour at most
ORIENTATION, ICC_PROFILE = 274, 34675
# Of TIFF's tags those without which its pixels cannot be read, or are others.
TIFF_USED = {*range(256, 260), 262, 266, 273, ORIENTATION, 277, 278, 279, 284, 292, 293, 317, *range(320, 326), 332}
TIFF_USED |= {338, 339, 340, 341, 347, *range(512, 522), *range(529, 533), ICC_PROFILE}
TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


def read_exif(file: Image.Image) -> tuple[bool, list[str]]:
    """Whether a camera's EXIF says that its colours are Adobe RGB's, and what is to be told of it.

    Cameras mark it so, without a profile: a colour space that is not sRGB, and in the interoperability that it is this.
    Some say 2 for the space, which EXIF does not know.
    """
    read_behind_pixels(file)
    notes, said = [], file.info.get("exif")
    try:
        if said is not None:  # of a JPEG Pillow has tried it, and kept to itself that it failed
            Image.Exif().load(said)
        exif = file.getexif()
        camera = exif.get_ifd(ExifTags.IFD.Exif)
        interoperability = exif.get_ifd(ExifTags.IFD.Interop) if ExifTags.IFD.Interop in camera else {}
    except Exception:  # whatever is in there
        notes = ["has EXIF data that is damaged; what cannot be read of it is ignored"]
        camera, interoperability = {}, {}
    if isinstance(said, bytes):
        camera = directory_in(said, ExifTags.IFD.Exif)
        interoperability = directory_in(said, ExifTags.IFD.Exif, ExifTags.IFD.Interop)
    space, index = camera.get(ExifTags.Base.ColorSpace), interoperability.get(ExifTags.Interop.InteropIndex)
    index = index.decode("latin-1") if isinstance(index, bytes) else str(index)
    return space == 2 or (space != 1 and index.strip("\0 ") == ADOBE_RGB), notes


def orientation_of(file: Image.Image) -> int:
    """How it has to be turned to be upright, from 1 to 8 as EXIF has it; 1, not at all, if it does not say."""
    read_behind_pixels(file)
    try:
        value = file.getexif().get(ORIENTATION)
    except Exception:  # as above
        value = None
    if value is None and isinstance(said := file.info.get("exif"), bytes):
        value = directory_in(said).get(ORIENTATION)
    return int(value) if value is not None and value in range(1, 9) else 1


def read_behind_pixels(file: Image.Image) -> None:
    """A PNG's EXIF may follow its pixels: asked for it, Pillow reads them, and what fails there is not the EXIF.

    Raises what Pillow does, and ValueError as `refuse_confusion`.
    """
    if file.format == "PNG" and "exif" not in file.info:
        file.load()
        refuse_confusion(file)


def directory_in(exif: bytes, *pointers: int) -> dict[int, int | bytes]:
    """The first directory of EXIF, or the one that the tags lead to: its values that are in it, of 4 bytes at most.

    Pillow reads none behind one that is damaged, and all that is used here is so short.
    """
    data = re.sub(b"^(Exif\0\0)+", b"", exif)
    order, found = {b"II": "<", b"MM": ">"}.get(data[:2], "<"), {}
    kinds = {1: "B", 3: "H", 4: "I"}
    with contextlib.suppress(struct.error):  # it is cut off, or leads nowhere
        at = struct.unpack_from(order + "4xI", data)[0]
        for place in range(at + 2, at + 2 + 12 * struct.unpack_from(order + "H", data, at)[0], 12):
            tag, kind, count, value = struct.unpack_from(order + "HHI4s", data, place)
            if TIFF_SIZES.get(kind, 5) * count <= 4:
                found[tag] = struct.unpack_from(order + kinds[kind], value)[0] if kind in kinds else value
    if pointers:
        lead = found.get(pointers[0], 0)
        lead = lead if isinstance(lead, int) else 0
        return directory_in(data[:4] + struct.pack(order + "I", lead) + data[8:], *pointers[1:]) if lead else {}
    return found


def refuse_confusion(file: Image.Image) -> None:
    """Raise ValueError for a PNG whose text Pillow mixes up with what it notes of the picture itself."""
    if isinstance(file, PngImagePlugin.PngImageFile):
        texts = file.png.im_text if file.png else file.text
        if PILLOWS_NAMES & texts.keys():
            raise ValueError("its text has names that are Pillow's own")


def without_metadata(file: BinaryIO) -> io.BytesIO | None:
    """The file in memory with its first picture, and of the rest only what is used and whole.

    None if it is of a format that is not known here, is larger than 1 GB, or is damaged where it can't be taken apart.
    """
    if file.seek(0, io.SEEK_END) > MAX_BYTES:
        return None
    file.seek(0)
    data = file.read()
    beginnings = {
        PNG_BEGINNING: png_without,
        b"\xff\xd8": jpeg_without,
        b"RIFF": webp_without,
        b"GIF8": gif_without,
        b"8BPS": psd_without,
        **dict.fromkeys(TiffImagePlugin.PREFIXES, tiff_without),
    }
    for beginning, without in beginnings.items():
        if data.startswith(beginning):
            with contextlib.suppress(struct.error, IndexError):
                return io.BytesIO(without(data))
    return None


def png_without(data: bytes) -> bytes:
    """A PNG's pixels, its transparency, its profile, and where it says so how it is to be turned."""
    kept, colours, at = [data[:8]], data[25], 8
    seen: set[bytes] = set()
    while b"IEND" not in seen:
        length, name = struct.unpack_from(">I4s", data, at)
        content, end = data[at + 8 : at + 8 + length], at + 12 + length
        whole = zlib.crc32(name + content) == int.from_bytes(data[end - 4 : end], "big")
        wanted = name == b"eXIf" or (name == b"sRGB" and length == 1)
        if name == b"tRNS":
            wanted = length <= 256 if colours == 3 else length == PNG_CLEAR_COLOUR.get(colours)
        elif name == b"iCCP":
            wanted = unpacks(content.partition(b"\0")[2])
        elif name in (b"iTXt", b"zTXt"):
            wanted = is_used_text(name, content)
        if name in PNG_PIXELS or (wanted and whole and name not in seen):
            kept.append(data[at:end])
            seen.add(name)
        at = end
    return b"".join(kept)


def is_used_text(name: bytes, content: bytes) -> bool:
    """Whether it is XMP, or EXIF as ImageMagick has it, of which the orientation is used, and can be unpacked."""
    keyword, _, rest = content.partition(b"\0")
    if name == b"zTXt":
        return keyword == b"Raw profile type exif" and unpacks(rest)
    if keyword != b"XML:com.adobe.xmp" or len(rest) < 2:
        return False
    text = rest[2:].split(b"\0", 2)[-1]
    return len(text) <= MAX_TEXT and (rest[0] == 0 or unpacks(rest[1:2] + text))


def unpacks(content: bytes) -> bool:
    """Whether what zlib has packed, after a byte for the method, is whole, and no bomb."""
    unpacked = zlib.decompressobj()
    try:
        unpacked.decompress(content[1:], MAX_TEXT)
    except zlib.error:
        return False
    return content[:1] == b"\0" and unpacked.eof


def jpeg_without(data: bytes) -> bytes:
    """A JPEG, of what programs say in it with that alone which its colours and its orientation need."""
    kept, at = [data[:2]], 2
    while data[at + 1] != 0xDA:
        marker, length = struct.unpack_from(">xBH", data, at)
        end = at + 2 + length
        content = data[at + 4 : end]
        used = {0xE0: b"JFIF\0", 0xE1: b"Exif\0\0", 0xE2: b"ICC_PROFILE\0", 0xEE: b"Adobe"}.get(marker, b"\0none")
        whole = content.startswith(used) and len(content) >= {0xE0: 12, 0xEE: 12}.get(marker, 0)
        if whole or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(data[at:end])
        at = end
    return b"".join([*kept, data[at:]])


def webp_without(data: bytes) -> bytes:
    """A WebP's first picture with its profile."""
    kept: dict[bytes, bytes] = {}
    for name, chunk in riff_chunks(data):
        if name in (b"VP8X", b"ICCP", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L"):
            kept.setdefault(name, chunk)
    if b"VP8X" in kept:
        extended = bytearray(kept[b"VP8X"])
        extended[8] &= ~0b1100  # neither EXIF nor XMP follows
        kept[b"VP8X"] = bytes(extended)
    body = b"WEBP" + b"".join(kept.values())
    return b"RIFF" + struct.pack("<I", len(body)) + body


def riff_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The name and all of each chunk that is whole."""
    at = 12
    while at + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, at)
        end = at + 8 + length + length % 2
        if end <= len(data):
            yield name, data[at:end]
        at = end


def gif_without(data: bytes) -> bytes:
    """A GIF's first picture, of its extensions with those alone that say what of it is transparent."""
    at = 13 + (3 * 2 ** ((data[10] & 7) + 1) if data[10] & 0x80 else 0)
    kept = [data[:at]]
    while data[at] == ord("!"):
        end = behind_blocks(data, at + 2)
        if data[at + 1 : at + 3] == b"\xf9\x04":
            kept.append(data[at:end])
        at = end
    table = 3 * 2 ** ((data[at + 9] & 7) + 1) if data[at + 9] & 0x80 else 0
    return b"".join([*kept, data[at : behind_blocks(data, at + 11 + table)], b";"])


def behind_blocks(data: bytes, at: int) -> int:
    """Where a GIF goes on behind the blocks that begin there: each with its length before it, the last of none."""
    while data[at]:
        at += 1 + data[at]
    return at + 1


def psd_without(data: bytes) -> bytes:
    """A PSD's picture as its layers make it, without them and without what is said beside."""
    colours = 30 + struct.unpack_from(">26xI", data)[0]
    layers = colours + 4 + struct.unpack_from(">I", data, colours)[0]
    merged = layers + 4 + struct.unpack_from(">I", data, layers)[0]
    return data[:colours] + bytes(8) + data[merged:]


def tiff_without(data: bytes) -> bytes:
    """A TIFF with only the first of its directories, and in it what its pixels need."""
    order = "<" if data[:2] == b"II" else ">"
    big = 43 in data[2:4]
    start = struct.unpack_from(order + ("8xQ" if big else "4xI"), data)[0]
    number, entry, pointer = ("Q", "HHQ8s", "Q") if big else ("H", "HHI4s", "I")
    size = struct.calcsize(order + entry)
    count = struct.unpack_from(order + number, data, start)[0]
    first = start + struct.calcsize(order + number)
    kept = []
    for at in range(first, min(first + count * size, len(data) - size + 1), size):
        tag, kind, length, value = struct.unpack_from(order + entry, data, at)
        inside = TIFF_SIZES.get(kind, len(data)) * length
        place = int.from_bytes(value, "little" if order == "<" else "big")
        whole = inside <= len(value) or place + inside <= len(data)
        known = tag in TIFF_USED and (tag != ORIENTATION or (kind == 3 and length == 1))
        if known and whole:
            kept.append(data[at : at + size])
    changed = bytearray(data)
    head = struct.pack(order + number, len(kept)) + b"".join(kept) + struct.pack(order + pointer, 0)
    changed[start : start + len(head)] = head
    return bytes(changed)
