"""What is beside the pixels of a file never keeps them from being read."""

import io
import logging
import struct
import tracemalloc
import warnings
import zlib

import icc
import numpy as np
import pytest
from odd_files import chunk, png, tiff
from PIL import Image

import deepstyle
from deepstyle_app.command import main
from deepstyle_support import metadata
from deepstyle_support.reading import shape_of

ROWS, COLUMNS = np.mgrid[:20, :30]
PICTURE = np.dstack([40 + 5 * COLUMNS, 30 + 9 * ROWS, 220 - 3 * COLUMNS - 2 * ROWS]).astype(np.uint8)
TURNED = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"  # EXIF of orientation 6
NO_EXIF = [
    b"",
    b"garbage",
    b"II*\0",
    b"MM\0*\xff\xff\xff\xff",
    b"II*\0\x08\0\0\0\xff\xff" + b"\x0f\x01\x02\0\xff\xff\0\0\xff\xff\0\0" * 3,  # tags that lie behind the end
    TURNED.replace(b"\x12\x01\x03\0\x01\0\0\0\x06", b"\x12\x01\x02\0\x05\0\0\0\x06"),  # an orientation in letters
    b"II*\0\x08\0\0\0\x01\0\x69\x87\x04\0\x01\0\0\0\xff\xff\xff\xff\0\0\0\0",  # a pointer to nowhere
]


def saved(kind, **options):
    file = io.BytesIO()
    if kind in ("webp", "jpeg"):
        options |= {"lossless": True, "quality": 95}
    Image.fromarray(PICTURE).save(file, format=kind, **options)
    return file.getvalue()


def png_with(*chunks, after=()):
    return png(2, 8, PICTURE, *chunks, after=after)


def jpeg_with(marker, content):
    data = saved("jpeg")
    return data[:2] + struct.pack(">BBH", 0xFF, marker, 2 + len(content)) + content + data[2:]


def webp_with(name, content):
    data = saved("webp")
    flags = {b"ICCP": 32, b"EXIF": 8, b"XMP ": 4}[name]
    canvas = struct.pack("<B3x", flags) + (29).to_bytes(3, "little") + (19).to_bytes(3, "little")
    extra = name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)
    pixels = data[12:]
    body = b"VP8X" + struct.pack("<I", 10) + canvas + (extra + pixels if name == b"ICCP" else pixels + extra)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def tiff_with(tags, compressed=False):
    own = {258: (3, [8, 8, 8]), 262: (3, [2]), 277: (3, [3])}
    return tiff([PICTURE.tobytes()], (20, 30), own | tags, compressed=compressed)


def read(tmp_path, data, as_it_is=True):
    """The picture and its notes in one text; its shape is the one that is told beforehand."""
    (tmp_path / "a").write_bytes(data)
    picture, notes = deepstyle.read_picture(str(tmp_path / "a"))
    assert picture.shape[:2] == shape_of(str(tmp_path / "a"))
    lossy = data.startswith(b"\xff\xd8") or b"ftyp" in data[:12]
    if as_it_is:
        assert np.abs(picture.astype(int) - PICTURE).max() <= (20 if lossy else 0)
    return picture, " ".join(notes)


@pytest.mark.parametrize("exif", NO_EXIF, ids=range(len(NO_EXIF)))
def test_exif_that_is_none_is_passed_over(tmp_path, exif):
    named = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n 9\n" + exif.hex().encode()))
    files = [png_with(chunk(b"eXIf", exif)), png_with(after=[chunk(b"eXIf", exif)]), png_with(named)]
    files += [png_with(chunk(b"tEXt", b"Raw profile type exif\0" + exif)), png_with(chunk(b"tEXt", b"exif\0" + exif))]
    files += [jpeg_with(0xE1, b"Exif\0\0" + exif), webp_with(b"EXIF", exif), webp_with(b"EXIF", b"Exif\0\0" + exif)]
    for data in files:
        read(tmp_path, data)


def test_damaged_exif_is_told(tmp_path):
    for data in (png_with(chunk(b"eXIf", b"garbage")), jpeg_with(0xE1, b"Exif\0\0garbage")):
        assert "has EXIF data that is damaged" in read(tmp_path, data)[1]


@pytest.mark.parametrize("junk", [b"", b"\0", b"garbage", bytes(range(200))])
def test_no_chunk_beside_the_pixels_of_a_png_keeps_them_from_being_read(tmp_path, junk):
    names = b"iCCP tEXt zTXt iTXt gAMA cHRM sRGB pHYs tIME bKGD sBIT hIST sPLT cICP acTL fcTL fdAT tRNS abCd".split()
    for name in names:
        read(tmp_path, png_with(chunk(name, junk)))
        read(tmp_path, png_with(after=[chunk(name, junk)]))
        read(tmp_path, png_with(chunk(name, junk)[:-1] + b"\xaa"))  # its checksum is wrong


@pytest.mark.parametrize("name", sorted(metadata.PILLOWS_NAMES))
def test_a_text_of_a_png_may_have_any_name(tmp_path, name):
    text = chunk(b"tEXt", name.encode() + b"\0some text")
    for data in (png_with(text), png_with(after=[text])):
        assert "damaged beside its picture" in read(tmp_path, data)[1]


@pytest.mark.parametrize("marker", [*range(0xE0, 0xF0), 0xFE])
def test_no_segment_of_a_jpeg_keeps_its_pixels_from_being_read(tmp_path, marker):
    beginnings = b"", b"JFXX\0", b"ICC_PROFILE\0\1\2", b"MPF\0", b"Photoshop 3.0\0008BIM\4\4\0\0", b"Adobe"
    for content in [one + junk for one in beginnings for junk in (b"", b"garbage", bytes(range(200)))]:
        read(tmp_path, jpeg_with(marker, content))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    "tag", [270, 282, 296, 305, 315, 330, 333, 700, 33550, 33723, 34377, 34665, 34675, 34853, 40965]
)
def test_no_tag_of_a_tiff_that_is_no_matter_of_its_pixels_keeps_them_from_being_read(tmp_path, capfd, tag, compressed):
    for kind, values in ((2, b"xyz\0"), (3, [65535] * 3), (4, [2**32 - 1] * 3), (7, bytes(range(99))), (11, [np.nan])):
        read(tmp_path, tiff_with({tag: (kind, values)}, compressed))
    assert capfd.readouterr().err == ""  # libtiff speaks of some


@pytest.mark.parametrize("content", [b"", b"garbage", b"<x:xmpmeta tiff:Orientation='nine'>", bytes(range(200))])
def test_odd_xmp_is_passed_over(tmp_path, content):
    for data in (
        png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + content)),
        png_with(chunk(b"tEXt", b"xmp\0" + content)),
        webp_with(b"XMP ", content),
        jpeg_with(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + content),
        tiff_with({700: (7, content or b"\0")}),
    ):
        read(tmp_path, data)


def gif_with(extension):
    data = saved("gif")
    colours = 13 + 3 * 2 ** ((data[10] & 7) + 1)
    return data[:colours] + extension + data[colours:]


def psd(resources=b"", layers=b""):
    head = struct.pack(">4sH6xHIIHHI", b"8BPS", 1, 3, 20, 30, 8, 3, 0)
    beside = struct.pack(">I", len(resources)) + resources + struct.pack(">I", len(layers)) + layers
    return head + beside + b"\0\0" + np.moveaxis(PICTURE, -1, 0).tobytes()


def test_no_extension_of_a_gif_keeps_its_pixels_from_being_read(tmp_path):
    expected, _ = read(tmp_path, saved("gif"), as_it_is=False)
    for label in (0xFE, 0xFF, 0xF9, 0x01, 0x33):
        for blocks in (b"\0", b"\3abc\0", b"\x0bNETSCAPE2.0\1a\0"):
            picture, _ = read(tmp_path, gif_with(b"!" + bytes([label]) + blocks), as_it_is=False)
            np.testing.assert_array_equal(picture[..., :3], expected)


def two_layers():
    layer = struct.pack(">4iH", 0, 0, 20, 30, 3) + b"".join(struct.pack(">hI", n, 602) for n in range(3))
    layer += b"8BIMnorm\xff\0\0\0" + struct.pack(">I", 12) + bytes(12)
    content = struct.pack(">h", 2) + 2 * layer + 6 * (b"\0\0" + bytes(600))
    return struct.pack(">I", len(content)) + content + bytes(4)


def test_the_layers_of_a_psd_are_one_picture(tmp_path):
    for layers in (b"", two_layers(), two_layers()[:50], b"\0\0\1\0" + b"\xff" * 300):
        assert read(tmp_path, psd(layers=layers))[1] == ""


def test_damaged_resources_of_a_psd_are_passed_over(tmp_path):
    for resources in (b"garbage", b"8BIM\4\x0f\0\0\0\1\0\0", b"8BIM\4\x0f\0\0" + struct.pack(">I", 2**31) + b"x"):
        read(tmp_path, psd(resources))


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff", "mpo"])
def test_what_is_cut_off_behind_the_first_picture_does_not_count(tmp_path, kind):
    file = io.BytesIO()
    others = [Image.fromarray(np.roll(PICTURE, by, 0)) for by in (5, 9)]
    lossless = {"lossless": True} if kind == "webp" else {}
    Image.fromarray(PICTURE).save(file, format=kind, save_all=True, append_images=others, **lossless)
    whole, _ = read(tmp_path, file.getvalue(), as_it_is=False)
    for share in (0.6, 0.8, 0.95):
        cut = file.getvalue()[: int(share * len(file.getvalue()))]
        picture, notes = read(tmp_path, cut, as_it_is=False)
        np.testing.assert_array_equal(picture, whole)
        assert "the first is used" in notes or "damaged" in notes
    if kind == "tiff":  # which has the place of the next picture before that
        assert "behind its first picture" in read(tmp_path, file.getvalue()[: int(0.6 * len(file.getvalue()))])[1]


def test_what_is_needed_of_damaged_metadata_is_used(tmp_path):
    profile, exif = icc.rgb_profile("Display P3"), chunk(b"eXIf", TURNED)
    icc_chunk = chunk(b"iCCP", b"P3\0\0" + zlib.compress(profile))
    bomb = chunk(b"zTXt", b"text\0\0" + zlib.compress(bytes(2**25)))
    expected = icc.in_srgb(np.rot90(PICTURE, -1), "Display P3")
    picture, notes = read(tmp_path, png_with(bomb, icc_chunk, exif), as_it_is=False)
    assert np.abs(picture - expected).max() <= 1.5
    assert "damaged beside its picture" in notes
    file = io.BytesIO()
    Image.fromarray(PICTURE).save(file, "tiff", icc_profile=profile, tiffinfo={274: 6, 315: "x"})
    data = file.getvalue().replace(struct.pack("<HHI", 315, 2, 2), struct.pack("<HHI", 330, 4, 2**30))
    picture, _ = read(tmp_path, data, as_it_is=False)
    assert np.abs(picture - expected).max() <= 1.5


def test_what_follows_a_damaged_tag_of_exif_is_used(tmp_path):
    far = struct.pack("<HHII", 271, 2, 9, 2**20)  # the camera's name, which is cut off
    exif = TURNED[:8] + b"\2\0" + far + TURNED[10:]
    for data in (png_with(chunk(b"eXIf", exif)), jpeg_with(0xE1, b"Exif\0\0" + exif), webp_with(b"EXIF", exif)):
        picture, _ = read(tmp_path, data, as_it_is=False)
        assert np.abs(picture.astype(int) - np.rot90(PICTURE, -1)).max() <= 20


def test_a_profile_may_be_larger_than_pillows_limit(tmp_path):
    profile = icc.rgb_profile("Display P3") + bytes(3 * 2**20)
    profile = struct.pack(">I", len(profile)) + profile[4:]
    picture, notes = read(tmp_path, png_with(chunk(b"iCCP", b"P3\0\0" + zlib.compress(profile))), as_it_is=False)
    assert np.abs(picture - icc.in_srgb(PICTURE, "Display P3")).max() <= 1.5
    assert notes == ""


@pytest.mark.parametrize("name", [b"zTXt", b"iTXt", b"iCCP", b"XMP", b"exif"])
@pytest.mark.parametrize("after", [False, True])
def test_a_bomb_beside_the_pixels_stays_packed(tmp_path, name, after):
    packed = zlib.compress(bytes(2**27))
    content = {
        b"zTXt": b"text\0\0",
        b"iTXt": b"text\0\1\0\0\0",
        b"iCCP": b"name\0\0",
        b"XMP": b"XML:com.adobe.xmp\0\1\0\0\0",
        b"exif": b"Raw profile type exif\0\0",
    }[name] + packed
    bomb = chunk({b"XMP": b"iTXt", b"exif": b"zTXt"}.get(name, name), content)
    data = png_with(after=[bomb]) if after else png_with(bomb)
    tracemalloc.start()
    read(tmp_path, data)
    assert tracemalloc.get_traced_memory()[1] < 80e6
    tracemalloc.stop()


def test_a_bomb_of_pixels_is_refused_whatever_is_beside(tmp_path):
    head = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    data = png_with(chunk(b"zTXt", b"text\0\0" + zlib.compress(bytes(2**25))))
    at = data.index(b"IHDR") - 4
    (tmp_path / "a").write_bytes(data[:at] + chunk(b"IHDR", head) + data[at + 25 :])
    with pytest.raises(deepstyle.UserError, match="Pillow's limit"):
        deepstyle.read_picture(str(tmp_path / "a"))


def test_damaged_pixels_are_refused_with_what_was_wrong_first(tmp_path):
    for kind in ("png", "tiff", "jpeg", "webp", "bmp", "gif"):
        data = saved(kind)
        (tmp_path / "a").write_bytes(data[: len(data) // 2])
        with pytest.raises(deepstyle.UserError, match=r"cannot read the picture|no picture that Pillow"):
            deepstyle.read_picture(str(tmp_path / "a"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["tiff", "png", "jpeg", "webp"])
def test_the_size_that_is_told_beforehand_is_that_of_the_upright_picture(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    options = {"tiffinfo": {274: orientation}} if kind == "tiff" else {"exif": exif}
    picture, _ = read(tmp_path, saved(kind, **options), as_it_is=False)
    expected = {1: PICTURE, 2: PICTURE[:, ::-1], 3: PICTURE[::-1, ::-1], 4: PICTURE[::-1]}
    expected |= {number + 4: np.rot90(one, -1)[:, ::-1] for number, one in ((1, PICTURE), (4, PICTURE[::-1, ::-1]))}
    expected |= {6: np.rot90(PICTURE, -1), 7: np.rot90(PICTURE)[:, ::-1], 8: np.rot90(PICTURE)}
    assert np.abs(picture.astype(int) - expected[orientation]).max() <= (20 if kind == "jpeg" else 0)


def test_no_warning_of_a_library_is_heard(tmp_path):
    cut = TURNED.replace(b"\x01\0\x12\x01", b"\x09\0\x12\x01")  # says that there are more tags
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for data in (jpeg_with(0xE1, b"Exif\0\0" + cut), png_with(*2 * [chunk(b"acTL", bytes(8))])):
            Image.open(io.BytesIO(data)).getexif()
            assert heard
            heard.clear()
            read(tmp_path, data, as_it_is=False)
            assert heard == []


def test_no_log_of_a_library_is_heard(tmp_path, caplog):
    (tmp_path / "a").write_bytes(tiff_with({277: (3, [99])}))  # more samples than there can be
    with pytest.raises(OSError, match="cannot identify"):
        Image.open(tmp_path / "a")
    assert caplog.records
    caplog.clear()
    with pytest.raises(deepstyle.UserError):
        deepstyle.read_picture(str(tmp_path / "a"))
    assert caplog.records == []
    assert logging.getLogger("PIL").level == logging.NOTSET


def test_a_warning_within_the_command_is_dropped(picture_files, monkeypatch, recwarn):
    def fail(*given):
        warnings.warn("of a library", stacklevel=1)
        raise deepstyle.UserError("enough")

    monkeypatch.setattr("deepstyle_app.command.run", fail)
    assert main([*picture_files, "out"]) == 2
    assert len(recwarn) == 0


def marked(space, index, at=0, more=b""):
    """EXIF with this colour space, and this index of interoperability; it begins at this byte of a file."""
    head = b"II*\0" + struct.pack("<IH", 8, 1) + struct.pack("<HHII", 34665, 4, 1, at + 26) + bytes(4)
    camera = struct.pack("<H", 2) + struct.pack("<HHIHxx", 0xA001, 3, 1, space)
    camera += struct.pack("<HHII", 0xA005, 4, 1, at + 56) + bytes(4)
    return head + camera + struct.pack("<HHHI4sI", 1, 1, 2, 4, index.encode(), 0)


def test_adobe_rgb_as_cameras_mark_it(tmp_path):
    adobe, srgb = icc.in_srgb(PICTURE, "Adobe RGB"), PICTURE
    for space, index, expected in ((65535, "R03", adobe), (2, "R98", adobe), (1, "R98", srgb), (65535, "R98", srgb)):
        exif = marked(space, index)
        # In a TIFF these are directories of its own; here with those of the EXIF's at its end.
        own = len(tiff_with({34665: (4, [0])}))
        in_tiff = tiff_with({34665: (4, [own + 26])}) + marked(space, index, own)
        for data in (png_with(chunk(b"eXIf", exif)), webp_with(b"EXIF", exif), in_tiff):
            picture, notes = read(tmp_path, data, as_it_is=False)
            assert np.abs(picture - expected).max() <= 1.5
            assert notes == ""


UNUSABLE = {"bomb": chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**25))), "EXIF": chunk(b"tEXt", b"exif\0some text")}


@pytest.mark.parametrize("text", UNUSABLE)
@pytest.mark.parametrize("behind", [True, False])
def test_the_exif_of_a_png_is_used_whatever_text_is_before_or_behind_it(tmp_path, text, behind):
    turned = TURNED[:8] + b"\x02" + TURNED[9:22]  # a directory of two tags, to which the camera's is added
    exif = turned + struct.pack("<HHII", 34665, 4, 1, 38) + bytes(4) + marked(65535, "R03", at=12)[26:]
    upright = np.rot90(icc.in_srgb(PICTURE, "Adobe RGB"), -1)
    for chunks in ([chunk(b"eXIf", exif), UNUSABLE[text]], [UNUSABLE[text], chunk(b"eXIf", exif)]):
        data = png_with(after=chunks) if behind else png_with(*chunks)
        picture, notes = read(tmp_path, data, as_it_is=False)
        assert np.abs(picture - upright).max() <= 1.5
        assert "damaged beside its picture" in notes


def test_a_profile_says_more_than_a_cameras_mark(tmp_path):
    profile = zlib.compress(icc.rgb_profile("Display P3"))
    data = png_with(chunk(b"iCCP", b"P3\0\0" + profile), chunk(b"eXIf", marked(65535, "R03")))
    picture, _ = read(tmp_path, data, as_it_is=False)
    assert np.abs(picture - icc.in_srgb(PICTURE, "Display P3")).max() <= 1.5
