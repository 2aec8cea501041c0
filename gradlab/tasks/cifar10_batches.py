"""Reading the pickled CIFAR-10 batch files without running anything they name."""

from __future__ import annotations

import io
import pickle
import re
import struct
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from gradlab.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["read_batches"]

_CLASSES = 10
_PIXELS = 3 * 32 * 32


class _ForbiddenNameError(Exception):
    """A pickle names something that is no part of a numpy array."""


class _Dtype:
    """Stands in for `numpy.dtype` while unpickling: a plain number type and its byte order, as they are written."""

    def __init__(self, code: str | bytes, *_flags: object) -> None:
        self.code = code.decode("ascii") if isinstance(code, bytes) else code
        self.order = "="
        if not re.fullmatch("[iuf][1248]", self.code):
            raise ValueError(f"no plain number type: {self.code}")

    def __setstate__(self, state: tuple[object, ...]) -> None:
        order = state[1]
        self.order = order.decode("ascii") if isinstance(order, bytes) else str(order)

    def numbers(self, raw: bytes) -> NDArray[Any]:
        return np.frombuffer(raw, np.dtype(self.order + self.code))


class _Array:
    """Stands in for `numpy.ndarray` while unpickling."""

    def __init__(self) -> None:
        self.values: NDArray[Any] | None = None

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Dtype, bool, bytes]) -> None:
        _, shape, dtype, fortran, raw = state
        self.values = dtype.numbers(raw).reshape(shape, order="F" if fortran else "C")


def _reconstruct(*_arguments: object) -> _Array:
    """Stand in for numpy's function of this name: an empty array, whose state follows."""
    return _Array()


def _from_buffer(raw: bytes, dtype: _Dtype, shape: tuple[int, ...], order: Literal["C", "F"]) -> _Array:
    """Stand in for `_frombuffer`, which protocol 5 uses."""
    array = _Array()
    array.values = dtype.numbers(raw).reshape(shape, order=order)
    return array


def _scalar(dtype: _Dtype, raw: bytes) -> int | float:
    """Stand in for `scalar`, the form of a single numpy number."""
    number: int | float = dtype.numbers(raw).item()
    return number


def _encode(text: str, encoding: str) -> bytes:
    """Stand in for `_codecs.encode`, with which Python 3 writes bytes in protocols below 3; no other codec serves."""
    if encoding not in ("latin1", "latin-1"):
        raise _ForbiddenNameError(f"codec {encoding}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], object] = {("_codecs", "encode"): _encode}
# numpy 2 renamed its core; files of both ages are about.
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    _ALLOWED[f"{_core}.multiarray", "scalar"] = _scalar
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _from_buffer
_ALLOWED["numpy", "ndarray"] = _Array
_ALLOWED["numpy", "dtype"] = _Dtype


class _ArrayUnpickler(pickle._Unpickler):
    """An unpickler that resolves the few names numpy arrays need, to stand-ins, and refuses every other unimported.

    It is the unpickler written in Python, and numpy's own reconstruction is not used, because damaged bytes made the
    C code of either crash or reserve all memory. A batch takes it some 50 ms.
    """

    # Set by the base class's load, but not in its type stub.
    read: Callable[[int], bytes]
    append: Callable[[object], None]

    def __init__(self, content: bytes) -> None:
        # The official files were written by Python 2, whose strings are bytes.
        super().__init__(io.BytesIO(content), encoding="bytes")

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _ALLOWED:
            raise _ForbiddenNameError(f"{module}.{name}")
        return _ALLOWED[module, name]

    def _load_bytearray8(self) -> None:
        # The original reserves as much memory as the file claims to need; a read stops where the file ends.
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(size))

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BYTEARRAY8[0]: _load_bytearray8}


def read_batches(folder: Path, names: Sequence[str]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read CIFAR-10 batch files and join them.

    Args:
        folder: The folder `cifar-10-batches-py`.
        names: File names in it, in the order their images shall have.

    Returns:
        Pixels, uint8, shape (N, 3, 32, 32), and labels, int64, shape (N,); N is what the files hold.

    Raises:
        DataError: A file is missing, damaged, not what a CIFAR-10 batch is, or names anything but numpy arrays;
            in that last case nothing it names has been imported or run.
    """
    parts = [_read_batch(folder / name) for name in names]
    pixels = np.concatenate([pixels for pixels, _ in parts]).reshape(-1, 3, 32, 32)
    return pixels, np.concatenate([labels for _, labels in parts])


def _read_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    try:
        batch = _ArrayUnpickler(path.read_bytes()).load()
    except OSError as error:
        raise DataError(f"Cannot read the CIFAR-10 file {path}: {error.strerror or error}.") from error
    except _ForbiddenNameError as error:
        raise DataError(
            f"The CIFAR-10 file {path} names {str(error)!a}, which no batch of images needs, so it was not loaded; "
            "replace it with the official one."
        ) from error
    # A damaged pickle can fail in about any way: the bytes that are wrong may stand for anything.
    except Exception as error:
        raise _damaged(path, f"it does not unpickle ({type(error).__name__})") from error
    if not isinstance(batch, dict):
        raise _damaged(path, f"it holds a {type(batch).__name__} in place of a dict")
    pixels = _pixels(path, batch.get(b"data"))
    return pixels, _labels(path, batch.get(b"labels"), len(pixels))


def _pixels(path: Path, data: object) -> NDArray[np.uint8]:
    values = data.values if isinstance(data, _Array) else None
    if values is None:
        raise _damaged(path, "it has no array under b'data'")
    if values.dtype != np.uint8 or values.ndim != 2 or values.shape[1] != _PIXELS or not len(values):
        raise _damaged(path, f"b'data' is {values.dtype} of shape {values.shape} in place of uint8 (n, {_PIXELS})")
    return values


def _labels(path: Path, raw: object, images: int) -> NDArray[np.int64]:
    if isinstance(raw, _Array):
        raw = raw.values
    if not isinstance(raw, list | np.ndarray):
        raise _damaged(path, "it has no list under b'labels'")
    try:
        labels = np.asarray(raw)
    except ValueError as error:  # a ragged list
        raise _damaged(path, "b'labels' is no flat list of integers") from error
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise _damaged(path, "b'labels' is no flat list of integers")
    if len(labels) != images:
        raise _damaged(path, f"it has {len(labels)} labels for {images} images")
    if labels.min() < 0 or labels.max() >= _CLASSES:
        raise _damaged(path, f"its labels run from {labels.min()} to {labels.max()} in place of 0 to {_CLASSES - 1}")
    return labels.astype(np.int64)


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"The CIFAR-10 file {path} is damaged: {why}; remove it and fetch the data set again.")
