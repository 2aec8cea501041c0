"""Where the CIFAR-10 files lie: found, or downloaded once, checked and unpacked; needs no torch."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path

from gradlab.errors import DataError

__all__ = ["ARCHIVE", "CIFAR10_MD5", "CIFAR10_URL", "TEST_FILES", "TRAIN_FILES", "fetch_cifar10", "find_cifar10"]

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
# Published beside the archive on https://www.cs.toronto.edu/~kriz/cifar.html.
CIFAR10_MD5 = "c58f30108f718f92721af3b95e74349a"
ARCHIVE = "cifar-10-python.tar.gz"
FOLDER = "cifar-10-batches-py"
TRAIN_FILES = tuple(f"data_batch_{k}" for k in range(1, 6))
TEST_FILES = ("test_batch",)

_NEEDED = TRAIN_FILES + TEST_FILES
_TIMEOUT = 30.0  # seconds without a byte before the server is given up


def find_cifar10(
    data_dir: str | os.PathLike[str] | None = None, *, cache_dir: str | os.PathLike[str] | None = None
) -> Path | None:
    """Say where the CIFAR-10 files lie, without loading or downloading anything.

    Args:
        data_dir: The only place to look: the folder `cifar-10-batches-py` itself, the folder above it, or one that
            holds `cifar-10-python.tar.gz`. Default: look in $GRADLAB_DATA, then in the user's cache.
        cache_dir: The cache folder. Default: the operating system's place for gradlab's cached files.

    Returns:
        The folder with all six batch files, or the archive if only that is there (not yet checked), or None.

    Example:
        >>> find_cifar10("no/such/folder") is None
        True
    """
    if data_dir is not None:
        return _look(Path(data_dir).expanduser())
    places = [Path(os.environ["GRADLAB_DATA"]).expanduser()] if os.environ.get("GRADLAB_DATA") else []
    return next((found for place in [*places, _cache(cache_dir)] if (found := _look(place)) is not None), None)


def fetch_cifar10(
    data_dir: str | os.PathLike[str] | None = None,
    *,
    download: bool = True,
    url: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Return the folder with the six CIFAR-10 batch files, unpacking or downloading the archive if need be.

    The archive is trusted only with the right MD5 sum, and the unpacked folder appears under its name only when whole,
    so an interruption at any moment leaves nothing that a later run would take for good.

    Args:
        data_dir: As in `find_cifar10`; when given, nothing is downloaded.
        download: Whether the archive may be downloaded to the cache when no files are found. Default: yes.
        url: Where to download from. Default: the authors' page, `CIFAR10_URL`.
        cache_dir: As in `find_cifar10`.

    Returns:
        The folder `cifar-10-batches-py`.

    Raises:
        DataError: Nothing was found where it was said to be, the archive is damaged, or the download failed.
    """
    cache = _cache(cache_dir)
    found = find_cifar10(data_dir, cache_dir=cache)
    if found is not None and found.is_dir():
        return found
    if data_dir is not None and found is None:
        raise _not_found(Path(data_dir).expanduser())
    if found is None or (found == cache / ARCHIVE and download and not _is_official(found)):
        if not download:
            raise DataError(f"CIFAR-10 was not found and downloading is off; {_by_hand(cache)}.")
        found = _download(url or CIFAR10_URL, cache)
        folder = _unpack(found, cache)
        _remove(found)
        return folder
    if not _is_official(found):
        raise DataError(
            f"The archive {found} is damaged or not the official one: its MD5 sum is not {CIFAR10_MD5}; "
            f"fetch it again from {CIFAR10_URL}."
        )
    # Beside the archive, so that what the user placed stays in one place; in the cache where that cannot be written.
    if os.access(found.parent, os.W_OK):
        return _unpack(found, found.parent)
    return cache / FOLDER if not _missing(cache / FOLDER) else _unpack(found, cache)


def _cache(cache_dir: str | os.PathLike[str] | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    import pooch  # imported late: it is slow, and most calls find the files without it

    return Path(pooch.os_cache("gradlab"))


def _look(place: Path) -> Path | None:
    """Return the complete batch folder at or in `place`, else the archive there, else None."""
    for folder in (place, place / FOLDER):
        if not _missing(folder):
            return folder
    return next((archive for archive in (place, place / ARCHIVE) if archive.is_file()), None)


def _missing(folder: Path) -> list[str]:
    return [name for name in _NEEDED if not (folder / name).is_file()]


def _not_found(place: Path) -> DataError:
    for folder in (place, place / FOLDER):
        missing = _missing(folder)
        if len(missing) < len(_NEEDED):
            return DataError(f"CIFAR-10 in {folder} is incomplete: {', '.join(missing)} missing; place the rest there.")
    what = "holds neither" if place.is_dir() else "does not exist; give a folder that holds"
    either = "nor" if place.is_dir() else "or"
    return DataError(f"The data folder {place} {what} {FOLDER} {either} {ARCHIVE} (from {CIFAR10_URL}).")


def _by_hand(cache: Path) -> str:
    return f"place {ARCHIVE} by hand in {cache}, or give the folder that holds it with --data-dir"


def _is_official(archive: Path) -> bool:
    try:
        with archive.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
    except OSError as error:
        raise DataError(f"Cannot read the archive {archive}: {error.strerror or error}.") from error
    return digest.hexdigest() == CIFAR10_MD5


def _download(url: str, cache: Path) -> Path:
    """Download the archive; pooch writes to a temporary name and renames only what has the right sum."""
    import pooch

    print(f"Downloading CIFAR-10 (170 MB) from {url} to {cache} ...", file=sys.stderr, flush=True)
    log = pooch.get_logger()
    level = log.level
    log.setLevel("WARNING")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        downloader = pooch.HTTPDownloader(progressbar=False, chunk_size=1 << 16, timeout=_TIMEOUT)
        return Path(pooch.retrieve(url, f"md5:{CIFAR10_MD5}", fname=ARCHIVE, path=cache, downloader=downloader))
    # requests' errors are OSErrors; pooch says ValueError for a wrong sum, requests for a URL it cannot read.
    except (OSError, ValueError) as error:
        raise DataError(
            f"CIFAR-10 could not be downloaded from {url} ({_reason(error)}); {_by_hand(cache)}."
        ) from error
    finally:
        log.setLevel(level)


def _reason(error: Exception) -> str:
    """Say in a few words what stopped a download; the libraries' own messages run over many lines."""
    response = getattr(error, "response", None)
    if response is not None:
        response.close()  # requests leaves the connection of a refused request open
        return f"the server answered {response.status_code}"
    kind = type(error).__name__
    if kind == "ValueError" and "hash" in str(error):
        return "what arrived is truncated or altered: wrong MD5 sum"
    if kind == "ChunkedEncodingError":
        return "the connection broke before the end"
    if "Timeout" in kind or "timed out" in str(error):
        return "the server did not answer in time"
    if kind in ("ConnectionError", "SSLError", "ProxyError"):
        return f"no connection: {kind}"
    return f"{kind}: {str(error).splitlines()[0]}" if str(error) else kind


def _unpack(archive: Path, into: Path) -> Path:
    """Unpack a checked archive to a temporary folder and rename it, so that FOLDER is only ever there whole."""
    target = into / FOLDER
    try:
        into.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".cifar-10-", dir=into, ignore_cleanup_errors=True) as scratch:
            fresh = Path(scratch) / FOLDER
            fresh.mkdir()
            _extract(archive, fresh)
            _publish(fresh, target)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"The archive {archive} could not be unpacked into {into}: {_reason(error)}.") from error
    return target


def _extract(archive: Path, folder: Path) -> None:
    """Copy the known members, each to its known name: no path in the archive is ever followed."""
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            name = member.name.removeprefix(f"{FOLDER}/")
            if member.name == f"{FOLDER}/{name}" and name in (*_NEEDED, "batches.meta") and member.isreg():
                source = tar.extractfile(member)
                if source is not None:
                    with source, (folder / name).open("wb") as out:
                        shutil.copyfileobj(source, out)
    if missing := _missing(folder):
        raise DataError(f"The archive {archive} holds no {FOLDER}/{missing[0]}; fetch it again from {CIFAR10_URL}.")


def _publish(fresh: Path, target: Path) -> None:
    if not target.exists():
        try:
            fresh.rename(target)
        except OSError:
            # Another process may have been quicker; its files came from the same checked archive.
            if _missing(target):
                raise
        return
    for file in fresh.iterdir():  # a folder left incomplete by hand: replace file by file
        file.replace(target / file.name)


def _remove(archive: Path) -> None:
    try:
        archive.unlink()
    except OSError:
        # Windows keeps a file that another process reads; it costs disk space and nothing else.
        return
