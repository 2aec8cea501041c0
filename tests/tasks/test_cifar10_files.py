"""Finding, downloading, checking and unpacking the CIFAR-10 archive, with a local server that can misbehave."""

from __future__ import annotations

import gc
import io
import os
import socket
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gradlab.errors import DataError
from gradlab.tasks import cifar10_files
from gradlab.tasks.cifar10_files import ARCHIVE, fetch_cifar10, find_cifar10

FOLDER = "cifar-10-batches-py"


class Server:
    """Serves one body; `behaviour` is changed by a test between two requests."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.behaviour = "good"
        self.requests = 0
        self.released = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests += 1
                outer.answer(self)

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/{ARCHIVE}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = {
            "truncated": self.body[: len(self.body) // 2],
            "altered": self.body[:-20] + bytes(20),
        }.get(self.behaviour, self.body)
        if self.behaviour == "missing":
            handler.send_error(404)
            return
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if self.behaviour == "dropped":
            handler.wfile.write(body[: len(body) // 2])
            handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_RDWR)
        elif self.behaviour == "stalled":
            handler.wfile.write(body[: len(body) // 2])
            handler.wfile.flush()
            self.released.wait(10)
        else:
            handler.wfile.write(body)

    def close(self) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def server(tiny):
    server = Server(tiny.archive)
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _only_the_tiny_data_set_exists(tiny, monkeypatch, tmp_path):
    """Take the tiny archive for the official one; let no test see this machine's files, cache, proxies or network."""
    monkeypatch.setattr(cifar10_files, "CIFAR10_MD5", tiny.md5)
    monkeypatch.setattr(cifar10_files, "CIFAR10_URL", "http://127.0.0.1:9/unreachable")
    monkeypatch.setattr(cifar10_files, "_TIMEOUT", 0.3)
    monkeypatch.delenv("GRADLAB_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def assert_whole(folder: Path, tiny) -> None:
    assert folder.name == FOLDER
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == tiny.files


class TestFind:
    @pytest.mark.parametrize("depth", ["itself", "parent"])
    def test_the_batch_folder(self, tiny, tmp_path, depth):
        folder = tiny.write(tmp_path / "data" / FOLDER)
        assert find_cifar10(folder if depth == "itself" else folder.parent) == folder

    def test_a_batch_folder_of_another_name(self, tiny, tmp_path):
        assert find_cifar10(str(tiny.write(tmp_path / "mine"))) == tmp_path / "mine"

    @pytest.mark.parametrize("given", ["folder", "archive"])
    def test_the_archive(self, tiny, tmp_path, given):
        archive = tmp_path / ARCHIVE
        archive.write_bytes(tiny.archive)
        assert find_cifar10(tmp_path if given == "folder" else archive) == archive

    def test_the_folder_before_the_archive(self, tiny, tmp_path):
        (tmp_path / ARCHIVE).write_bytes(b"")
        assert find_cifar10(tiny.write(tmp_path / FOLDER).parent) == tmp_path / FOLDER

    def test_home_is_expanded(self, tiny, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("USERPROFILE", str(tmp_path))
        tiny.write(tmp_path / "data")
        assert find_cifar10("~/data") == tmp_path / "data"

    def test_order_is_argument_then_environment_then_cache(self, tiny, tmp_path, cache, monkeypatch):
        assert find_cifar10(cache_dir=cache) is None
        cached = tiny.write(cache / FOLDER)
        assert find_cifar10(cache_dir=cache) == cached
        monkeypatch.setenv("GRADLAB_DATA", str(tmp_path / "env"))
        assert find_cifar10(cache_dir=cache) == cached
        from_environment = tiny.write(tmp_path / "env" / FOLDER)
        assert find_cifar10(cache_dir=cache) == from_environment
        given = tiny.write(tmp_path / "given")
        assert find_cifar10(given, cache_dir=cache) == given
        assert find_cifar10(tmp_path / "nothing", cache_dir=cache) is None

    def test_an_incomplete_folder_does_not_count(self, tiny, tmp_path):
        tiny.write(tmp_path / FOLDER, leave_out=("test_batch",))
        assert find_cifar10(tmp_path) is None

    def test_needs_no_torch(self):
        code = (
            "import sys; from gradlab.tasks import find_cifar10; find_cifar10('x'); find_cifar10(); "
            "assert 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


class TestGivenFolder:
    @pytest.mark.parametrize("exists", [True, False], ids=["empty", "absent"])
    def test_without_data_is_an_error_and_no_download(self, tiny, tmp_path, cache, server, exists):
        place = tmp_path / "place"
        if exists:
            place.mkdir()
        words = "holds neither .* nor" if exists else "does not exist"
        with pytest.raises(DataError, match=rf"^The data folder \S*place {words}.*\.$"):
            fetch_cifar10(place, url=server.url, cache_dir=cache)
        assert server.requests == 0
        assert not cache.exists()

    def test_that_is_incomplete_says_what_is_missing(self, tiny, tmp_path):
        tiny.write(tmp_path / FOLDER, leave_out=("data_batch_3", "test_batch"))
        with pytest.raises(
            DataError, match=r"is incomplete: data_batch_3, test_batch missing; place the rest there\.$"
        ):
            fetch_cifar10(tmp_path)

    @pytest.mark.parametrize("given", ["folder", "archive"])
    def test_with_the_archive_is_unpacked_beside_it(self, tiny, tmp_path, given):
        archive = tmp_path / ARCHIVE
        archive.write_bytes(tiny.archive)
        folder = fetch_cifar10(tmp_path if given == "folder" else archive)
        assert folder == tmp_path / FOLDER
        assert_whole(folder, tiny)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([ARCHIVE, FOLDER])

    def test_that_cannot_be_written_to_is_unpacked_into_the_cache_once(self, tiny, tmp_path, cache, monkeypatch):
        place = tmp_path / "place"
        place.mkdir()
        (place / ARCHIVE).write_bytes(tiny.archive)
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, who may write anywhere
        assert_whole(fetch_cifar10(place, cache_dir=cache), tiny)
        assert [path.name for path in place.iterdir()] == [ARCHIVE]
        before = (cache / FOLDER / "test_batch").stat().st_mtime_ns
        assert fetch_cifar10(place, cache_dir=cache) == cache / FOLDER
        assert (cache / FOLDER / "test_batch").stat().st_mtime_ns == before

    @pytest.mark.parametrize("keep", [0, 100, -1], ids="keep{}".format)
    def test_with_a_damaged_archive_is_refused_before_anything_is_unpacked(self, tiny, tmp_path, monkeypatch, keep):
        monkeypatch.setattr(tarfile, "open", lambda *arguments: pytest.fail("opened before the check"))
        (tmp_path / ARCHIVE).write_bytes(tiny.archive[:keep])
        with pytest.raises(DataError, match=rf"{ARCHIVE} is damaged .*MD5 sum is not {tiny.md5}; fetch it again"):
            fetch_cifar10(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [ARCHIVE]

    def test_incomplete_beside_the_archive_is_completed(self, tiny, tmp_path):
        (tmp_path / ARCHIVE).write_bytes(tiny.archive)
        tiny.write(tmp_path / FOLDER, leave_out=("test_batch",))
        (tmp_path / FOLDER / "data_batch_1").write_bytes(b"half a file")
        assert_whole(fetch_cifar10(tmp_path), tiny)


class TestUnpacking:
    def test_interrupted_leaves_nothing_and_a_rerun_works(self, tiny, tmp_path, monkeypatch):
        (tmp_path / ARCHIVE).write_bytes(tiny.archive)
        copy, calls = cifar10_files.shutil.copyfileobj, []

        def break_off(source, target):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            copy(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(cifar10_files.shutil, "copyfileobj", break_off)
            with pytest.raises(KeyboardInterrupt):
                fetch_cifar10(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [ARCHIVE]
        assert_whole(fetch_cifar10(tmp_path), tiny)

    def test_a_full_disk_is_a_data_error(self, tiny, tmp_path, monkeypatch):
        (tmp_path / ARCHIVE).write_bytes(tiny.archive)

        def fail(source, target):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(cifar10_files.shutil, "copyfileobj", fail)
        with pytest.raises(DataError, match=r"could not be unpacked into .*No space left on device\.$"):
            fetch_cifar10(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [ARCHIVE]

    def test_an_archive_without_a_batch_is_named(self, tiny, tmp_path, monkeypatch, archive_of):
        members = {f"{FOLDER}/{name}": content for name, content in tiny.files.items() if name != "data_batch_4"}
        (tmp_path / ARCHIVE).write_bytes(archive_of(members))
        monkeypatch.setattr(cifar10_files, "_is_official", lambda archive: True)
        with pytest.raises(DataError, match=f"holds no {FOLDER}/data_batch_4"):
            fetch_cifar10(tmp_path)
        assert not (tmp_path / FOLDER).exists()

    def test_no_path_or_link_in_the_archive_is_followed(self, tiny, tmp_path, monkeypatch, archive_of):
        secret = tmp_path / "secret"
        secret.write_bytes(b"not for you")
        place = tmp_path / "place"
        place.mkdir()
        members = {f"{FOLDER}/{name}": content for name, content in tiny.files.items()}
        members |= {"../outside": b"x", f"{FOLDER}/../../outside": b"x", f"{FOLDER}/extra": b"x", "test_batch": b"x"}
        out = io.BytesIO(archive_of(members))
        whole = io.BytesIO()
        with tarfile.open(fileobj=out) as source, tarfile.open(fileobj=whole, mode="w:gz") as target:
            for member in source:
                target.addfile(member, source.extractfile(member))
            link = tarfile.TarInfo(f"{FOLDER}/batches.meta")
            link.type, link.linkname = tarfile.SYMTYPE, str(secret)
            target.addfile(link)
        (place / ARCHIVE).write_bytes(whole.getvalue())
        monkeypatch.setattr(cifar10_files, "_is_official", lambda archive: True)
        assert_whole(fetch_cifar10(place), tiny)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["place", "secret"]

    def test_another_process_that_was_quicker_is_no_error(self, tiny, tmp_path, monkeypatch):
        (tmp_path / ARCHIVE).write_bytes(tiny.archive)

        def come_second(fresh, target):
            tiny.write(target)
            raise OSError(39, "Directory not empty")

        monkeypatch.setattr(Path, "rename", come_second)
        assert_whole(fetch_cifar10(tmp_path), tiny)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([ARCHIVE, FOLDER])

    def test_many_at_once_all_get_the_whole_folder(self, tiny, tmp_path):
        (tmp_path / ARCHIVE).write_bytes(tiny.archive)
        results: list[object] = []

        def work():
            try:
                results.append(fetch_cifar10(tmp_path))
            except BaseException as error:
                results.append(error)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [tmp_path / FOLDER] * 8
        assert_whole(tmp_path / FOLDER, tiny)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([ARCHIVE, FOLDER])


class TestDownload:
    def test_a_good_one_is_kept_and_not_repeated(self, tiny, cache, server, capfd):
        folder = fetch_cifar10(url=server.url, cache_dir=cache)
        assert folder == cache / FOLDER
        assert_whole(folder, tiny)
        assert [path.name for path in cache.iterdir()] == [FOLDER]  # the archive has served its purpose
        out, err = capfd.readouterr()
        assert out == ""
        assert err.splitlines() == [f"Downloading CIFAR-10 (170 MB) from {server.url} to {cache} ..."]
        assert fetch_cifar10(url=server.url, cache_dir=cache) == folder
        assert server.requests == 1

    def test_comes_from_the_authors_page_unless_told_otherwise(self, tiny, cache, server, monkeypatch):
        monkeypatch.setattr(cifar10_files, "CIFAR10_URL", server.url)
        assert_whole(fetch_cifar10(cache_dir=cache), tiny)

    @pytest.mark.parametrize(
        ("behaviour", "words"),
        [
            ("dropped", "the connection broke before the end"),
            ("stalled", "the server did not answer in time"),
            ("truncated", "truncated or altered: wrong MD5 sum"),
            ("altered", "truncated or altered: wrong MD5 sum"),
            ("missing", "the server answered 404"),
        ],
        ids=["connection-dropped", "stalled", "truncated-with-right-headers", "wrong-hash", "404"],
    )
    def test_a_failed_one_says_what_to_do_leaves_nothing_and_a_rerun_works(self, tiny, cache, server, behaviour, words):
        server.behaviour = behaviour
        with pytest.raises(DataError) as caught:
            fetch_cifar10(url=server.url, cache_dir=cache)
        message = str(caught.value)
        assert message == (
            f"CIFAR-10 could not be downloaded from {server.url} ({message.split('(', 1)[1].split(')')[0]}); "
            f"place {ARCHIVE} by hand in {cache}, or give the folder that holds it with --data-dir."
        )
        assert words in message
        assert list(cache.iterdir()) == []
        server.behaviour = "good"
        assert_whole(fetch_cifar10(url=server.url, cache_dir=cache), tiny)
        del caught
        gc.collect()  # a socket left open would warn here, and warnings are errors

    def test_no_network_says_what_to_do(self, cache):
        with socket.socket() as taken:  # bound but not listening: connections are refused
            taken.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{taken.getsockname()[1]}/{ARCHIVE}"
            with pytest.raises(DataError, match=r"\(no connection: ConnectionError\); place .* --data-dir\.$"):
                fetch_cifar10(url=url, cache_dir=cache)

    @pytest.mark.parametrize("url", ["nonsense", "http://", "gopher://x/y"], ids=["no-scheme", "no-host", "gopher"])
    def test_a_url_that_is_none_is_a_data_error(self, cache, url):
        with pytest.raises(DataError, match="could not be downloaded"):
            fetch_cifar10(url=url, cache_dir=cache)

    def test_a_cache_that_cannot_be_made_is_a_data_error(self, tmp_path, server):
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(DataError, match="could not be downloaded"):
            fetch_cifar10(url=server.url, cache_dir=tmp_path / "file" / "cache")

    def test_interrupted_by_the_user_leaves_nothing_and_a_rerun_works(self, tiny, cache, server, monkeypatch):
        import pooch

        def interrupt(self, url, output_file, pooch):
            Path(output_file).write_bytes(tiny.archive[:50])
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(pooch.HTTPDownloader, "__call__", interrupt)
            with pytest.raises(KeyboardInterrupt):
                fetch_cifar10(url=server.url, cache_dir=cache)
        assert list(cache.iterdir()) == []
        assert_whole(fetch_cifar10(url=server.url, cache_dir=cache), tiny)

    def test_off_and_nothing_found_says_what_to_do(self, cache, server):
        with pytest.raises(DataError, match=rf"downloading is off; place {ARCHIVE} by hand in .*cache, or"):
            fetch_cifar10(url=server.url, cache_dir=cache, download=False)
        assert server.requests == 0

    def test_an_archive_placed_by_hand_in_the_cache_is_used_and_kept(self, tiny, cache, server):
        cache.mkdir()
        (cache / ARCHIVE).write_bytes(tiny.archive)
        assert_whole(fetch_cifar10(url=server.url, cache_dir=cache, download=False), tiny)
        assert (cache / ARCHIVE).exists()
        assert server.requests == 0

    def test_a_half_archive_in_the_cache_is_replaced(self, tiny, cache, server):
        cache.mkdir()
        (cache / ARCHIVE).write_bytes(tiny.archive[:99])
        with pytest.raises(DataError, match="is damaged"):
            fetch_cifar10(url=server.url, cache_dir=cache, download=False)
        assert_whole(fetch_cifar10(url=server.url, cache_dir=cache), tiny)
