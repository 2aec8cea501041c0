"""Reading pickled batches: what the official files hold, what is damaged, and what is hostile."""

from __future__ import annotations

import os
import pickle
import struct
import tracemalloc
from collections import OrderedDict

import numpy as np
import pytest

from gradlab.errors import DataError
from gradlab.tasks.cifar10_batches import read_batches


def make_batch(count: int = 2, **changes: object) -> dict[bytes, object]:
    pixels = np.arange(count * 3072, dtype=np.int64) % 251
    batch: dict[bytes, object] = {
        b"data": pixels.astype(np.uint8).reshape(count, 3072),
        b"labels": [k % 10 for k in range(count)],
    }
    return batch | {key.encode(): value for key, value in changes.items()}


def python2_pickle(data: bytes, count: int, labels: list[int]) -> bytes:
    """Write by hand what Python 2 and the numpy of its day wrote: byte strings, and 0 and 1 for the dtype's flags."""

    def string(value: bytes) -> bytes:
        return b"T" + struct.pack("<I", len(value)) + value if len(value) > 255 else b"U" + bytes([len(value)]) + value

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b") + b"\x87R"
        b"(K\x01" + b"M" + struct.pack("<H", count) + b"M" + struct.pack("<H", 3072) + b"\x86"
        b"cnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87R"
        b"(K\x03" + string(b"|") + b"NNN" + b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89" + string(data) + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + string(b"data") + array + string(b"labels") + numbers + b"u."


@pytest.fixture
def read(tmp_path):
    """Write bytes to a batch file and read it back."""

    def write_and_read(content: bytes):
        (tmp_path / "data_batch_1").write_bytes(content)
        return read_batches(tmp_path, ["data_batch_1"])

    return write_and_read


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1), ids="protocol{}".format)
def test_reads_every_pickle_protocol(read, protocol):
    batch = make_batch()
    pixels, labels = read(pickle.dumps(batch, protocol=protocol))
    assert pixels.dtype == np.uint8
    assert labels.dtype == np.int64
    assert np.array_equal(pixels, batch[b"data"].reshape(2, 3, 32, 32))
    assert labels.tolist() == [0, 1]


def test_reads_what_python_2_wrote_without_a_warning(read):
    batch = make_batch(3)
    pixels, labels = read(python2_pickle(batch[b"data"].tobytes(), 3, [7, 0, 9]))
    assert np.array_equal(pixels.reshape(3, 3072), batch[b"data"])
    assert labels.tolist() == [7, 0, 9]


def test_labels_may_be_numpy_integers(read):
    assert read(pickle.dumps(make_batch(labels=[np.int64(3), np.int64(4)])))[1].tolist() == [3, 4]
    assert read(pickle.dumps(make_batch(labels=np.array([5, 6], dtype=">i4"))))[1].tolist() == [5, 6]


def test_an_array_stored_by_columns_is_read_in_its_own_order(read):
    batch = make_batch()
    columns = {b"data": np.asfortranarray(batch[b"data"]), b"labels": [0, 1]}
    for protocol in (2, 5):
        assert np.array_equal(read(pickle.dumps(columns, protocol=protocol))[0].reshape(2, 3072), batch[b"data"])


def test_pixel_order_is_channel_row_column(read):
    data = np.zeros((1, 3072), dtype=np.uint8)
    data[0, 2 * 1024 + 5 * 32 + 7] = 9  # blue, row 5, column 7, as the data set's page describes it
    pixels, _ = read(pickle.dumps(make_batch(1, data=data)))
    assert np.argwhere(pixels).tolist() == [[0, 2, 5, 7]]


def test_joins_files_in_the_order_given(tmp_path):
    for k, name in enumerate("ab"):
        (tmp_path / name).write_bytes(pickle.dumps(make_batch(k + 1, labels=[k] * (k + 1))))
    pixels, labels = read_batches(tmp_path, ["b", "a"])
    assert pixels.shape == (3, 3, 32, 32)
    assert labels.tolist() == [1, 1, 0]


class Caller:
    """Pickles as a call of any function with any arguments."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class TestHostilePickles:
    @pytest.mark.parametrize("protocol", [0, 2, 4], ids="protocol{}".format)
    def test_a_shell_command_is_refused_and_not_run(self, read, tmp_path, protocol):
        proof = tmp_path / "was-run"
        attack = pickle.dumps(make_batch(extra=Caller(os.system, f"touch {proof}")), protocol=protocol)
        with pytest.raises(DataError, match=r"data_batch_1 names '(posix|nt)\.system', which no batch .* not loaded"):
            read(attack)
        assert not proof.exists()
        pickle.loads(attack)  # the attack itself is sound: a plain unpickler runs it
        assert proof.exists()

    @pytest.mark.parametrize(
        ("content", "name"),
        [
            (pickle.dumps(OrderedDict()), "collections.OrderedDict"),
            (pickle.dumps(Caller(eval, "1/0")), "builtins.eval"),
            (b"\x80\x02cnumpy\nload\n.", "numpy.load"),
            (b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.", "numpy.ndarray.tofile"),
            (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R.", "codec zip"),
        ],
        ids=["harmless-class", "eval", "numpy-load", "dotted-name", "codec"],
    )
    def test_any_other_name_is_refused(self, read, content, name):
        with pytest.raises(DataError, match=f"names '{name}'"):
            read(content)

    def test_a_module_it_names_is_not_even_imported(self, read, tmp_path, monkeypatch):
        (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(DataError, match=r"evil_module\.anything"):
            read(b"\x80\x02cevil_module\nanything\n.")


class TestDamagedFiles:
    @pytest.mark.parametrize(
        "content",
        [
            b"\x80\x05\x96" + struct.pack("<Q", 2**28) + b"short",
            b"\x80\x05B" + struct.pack("<I", 2**28) + b"short",
            b"\x80\x02Nr" + struct.pack("<I", 2**28),
        ],
        ids=["bytearray", "bytes", "memo"],
    )
    def test_reserves_no_more_memory_than_the_file_is_long(self, read, content):
        tracemalloc.start()
        with pytest.raises(DataError, match="it does not unpickle"):
            read(content)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 10e6

    def test_a_short_dtype_state_does_not_crash_the_interpreter(self, read):
        # One byte changed, and numpy's own reconstruction ends in a segmentation fault (numpy 2.4).
        whole = python2_pickle(bytes(3072), 1, [3])
        assert whole.count(b"NNNJ") == 1
        pixels, labels = read(whole.replace(b"NNNJ", b"Nq\x01J"))
        assert not pixels.any()
        assert labels.tolist() == [3]

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"data": None}, "no array under b'data'"),
            ({"data": np.zeros((2, 3071), np.uint8)}, r"uint8 of shape \(2, 3071\) in place of uint8 \(n, 3072\)"),
            ({"data": np.zeros(3072, np.uint8)}, r"shape \(3072,\)"),
            ({"data": np.zeros((2, 3072), np.float32)}, "float32 of shape"),
            ({"data": np.array([[None] * 3072] * 2)}, r"it does not unpickle \(ValueError\)"),
            ({"data": np.zeros((0, 3072), np.uint8), "labels": []}, r"shape \(0, 3072\)"),
            ({"labels": None}, "no list under b'labels'"),
            ({"labels": [1]}, "1 labels for 2 images"),
            ({"labels": [0, 10]}, "labels run from 0 to 10 in place of 0 to 9"),
            ({"labels": [-1, 3]}, "labels run from -1 to 3"),
            ({"labels": [0.0, 1.0]}, "no flat list of integers"),
            ({"labels": [[1], [2]]}, "no flat list of integers"),
            ({"labels": [[1], 2]}, "no flat list of integers"),
            ({"labels": [2**70, 1]}, "no flat list of integers"),
        ],
        ids=lambda value: None if isinstance(value, dict) else value.split("(")[0].strip().replace(" ", "-"),
    )
    def test_says_what_is_wrong_with_the_content(self, read, changes, words):
        with pytest.raises(DataError, match=rf"data_batch_1 is damaged: .*{words}.*; remove it"):
            read(pickle.dumps(make_batch(**changes)))

    def test_a_list_is_no_batch(self, read):
        with pytest.raises(DataError, match="it holds a list in place of a dict"):
            read(pickle.dumps([1, 2]))

    @pytest.mark.parametrize("keep", [0, 1, 30, 3000, -1], ids="keep{}".format)
    def test_a_truncated_file_is_named(self, read, keep):
        with pytest.raises(DataError, match=r"data_batch_1 is damaged: it does not unpickle \(\w+\)"):
            read(pickle.dumps(make_batch(), protocol=4)[:keep])

    def test_random_damage_gives_a_data_error_or_a_valid_batch(self, read):
        rng = np.random.default_rng(0)
        whole = pickle.dumps(make_batch(1), protocol=2)
        frame = [k for k in range(len(whole)) if k < 250 or k > len(whole) - 60]
        refused = 0
        for _ in range(300):
            content = bytearray(whole)
            content[rng.choice(frame)] = rng.integers(256)
            try:
                pixels, labels = read(bytes(content))
            except DataError:
                refused += 1
            else:
                assert pixels.shape == (len(labels), 3, 32, 32)
        assert refused > 50

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(DataError, match=r"Cannot read the CIFAR-10 file .*test_batch: No such file"):
            read_batches(tmp_path, ["test_batch"])
