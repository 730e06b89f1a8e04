import bz2
import errno
import gzip
import hashlib
import http.server
import io
import json
import lzma
import os
import sysconfig
import tarfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zstandard

from foreroute.engine.config import Corpus, CorpusConfig, Split, Tokens
from foreroute.engine.data import corpus, preparation
from foreroute.engine.data.corpus import prepare
from foreroute.engine.data.download import ENWIK8_BYTES, download_enwik8, enwik8_copy
from foreroute.engine.errors import UserError

TEXT = b"".join(b"line %d of the text\n" % i for i in range(50))


def file_config(tmp_path, text=TEXT, tokens=Tokens.bytes):
    path = tmp_path / "text.txt"
    path.write_bytes(text)
    return CorpusConfig(Corpus.file, str(path), tokens, str(tmp_path / "cache"))


def tar_of(form):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=form) as archive:
        member = tarfile.TarInfo("text.txt")
        member.size = len(TEXT)
        archive.addfile(member, io.BytesIO(TEXT))
    return packed.getvalue()


def plain_parts(text):
    a, b = len(text) * 90 // 100, len(text) * 95 // 100
    return [text[:a], text[a:b], text[b:]]


@pytest.mark.parametrize("tokens", [Tokens.bytes, Tokens.txl])
def test_splits_hold_the_text_and_what_is_before_it(tmp_path, tokens):
    made = prepare(file_config(tmp_path, tokens=tokens))
    parts = plain_parts(TEXT)
    if tokens is Tokens.txl:
        assert made.vocab.symbols == bytes(sorted(set(TEXT) - {10}))
        parts = [part.replace(b"\n", b"") for part in parts]
    for split, part in zip(Split, parts, strict=True):
        assert made.vocab.decode(made.split(split)) == part
    assert made.previous_id(Split.train) == 0
    assert made.previous_id(Split.valid) == made.split(Split.train)[-1]
    assert made.previous_id(Split.test) == made.split(Split.valid)[-1]
    assert isinstance(made.split(Split.test), np.memmap)
    assert made.sha256 == hashlib.sha256(TEXT).hexdigest()
    assert made.meta["units"] == len(TEXT) and made.document_ends.tolist() == [len(made.ids)]
    assert len(made.notes) == 1
    assert "90/5/5" in made.notes[0]


def test_second_call_reads_the_cache_and_changed_text_does_not(tmp_path):
    config, lines = file_config(tmp_path), []
    first = prepare(config, lines.append)
    again = prepare(config, lines.append)
    assert len(lines) == 1
    assert np.array_equal(first.ids, again.ids)
    changed = prepare(file_config(tmp_path, TEXT[::-1]), lines.append)
    assert len(lines) == 2
    assert changed.sha256 != first.sha256
    assert prepare(file_config(tmp_path, tokens=Tokens.txl)).vocab.size < 256


def test_several_at_once_leave_one_whole_folder(tmp_path):
    config = file_config(tmp_path)
    start = threading.Barrier(6)

    def run(_):
        start.wait()
        return prepare(config).ids.tobytes()

    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(run, range(6))) == {TEXT}
    assert len(list((tmp_path / "cache" / "corpora").iterdir())) == 1


def test_damaged_cache_is_named(tmp_path):
    config = file_config(tmp_path)
    prepare(config)
    (folder,) = (tmp_path / "cache" / "corpora").iterdir()
    (folder / "ids.bin").write_bytes(b"short")
    with pytest.raises(UserError, match=f"{folder.name}: damaged"):
        prepare(config)
    (folder / "meta.json").write_text("{")
    with pytest.raises(UserError, match=f"{folder.name}: damaged"):
        prepare(config)


def test_ids_are_compared_with_their_checksum_once(tmp_path, monkeypatch):
    """And again when the file has changed in any way: ids of the right length but all zeros would train."""
    seen = []
    real = corpus.sha256_of
    monkeypatch.setattr(corpus, "sha256_of", lambda path: seen.append(path) or real(path))
    config = file_config(tmp_path)
    for _ in range(3):
        prepare(config)
    assert len(seen) == 1
    (ids,) = (tmp_path / "cache").rglob("ids.bin")
    state = ids.stat()
    ids.write_bytes(bytes(len(TEXT)))
    os.utime(ids, ns=(state.st_atime_ns, state.st_mtime_ns))  # as if nothing had happened
    with pytest.raises(UserError, match=r"damaged \(the sha256 of ids.bin is not the one in meta"):
        prepare(config)
    ids.write_bytes(TEXT)
    assert bytes(prepare(config).ids) == TEXT and len(seen) == 3


def test_a_changed_number_in_meta_json_is_damage(tmp_path):
    prepare(file_config(tmp_path))
    (path,) = (tmp_path / "cache").rglob("meta.json")
    meta = json.loads(path.read_text())
    meta["cuts"][1] -= 1  # the splits would be others
    path.write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"damaged .*its checksum does not match"):
        prepare(file_config(tmp_path))


def test_the_cache_of_an_earlier_version_is_made_anew(tmp_path):
    config, lines = file_config(tmp_path), []
    old = tmp_path / "cache/corpora" / f"file-bytes-{hashlib.sha256(TEXT).hexdigest()[:16]}"
    old.mkdir(parents=True)
    (old / "meta.json").write_text("{}")
    assert bytes(prepare(config, lines.append).ids) == TEXT
    assert len(lines) == 1 and "preparing" in lines[0]


def test_a_cache_of_another_user_is_not_called_damaged(tmp_path, monkeypatch):
    config = file_config(tmp_path)
    prepare(config)
    opened = Path.open

    def refused(path, *arguments, **options):
        if path.name == "ids.bin":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(
        UserError, match=r"^corpus.cache_dir=.* cannot be read \(Permission denied\), .*take another corpus.cache_dir$"
    ):
        prepare(config)


def test_an_interrupted_preparation_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(path):
        raise SystemExit(143)

    monkeypatch.setattr(preparation, "sync", interrupted)
    with pytest.raises(SystemExit):
        prepare(file_config(tmp_path))
    assert not list((tmp_path / "cache/corpora").iterdir())


@pytest.mark.parametrize(
    "text, message",
    [
        (b"", "the text is empty"),
        (b"ab", "2 bytes are too short"),
        (b"\n" * 400, "too short"),
        (b"a" * 400, "has one symbol only"),
        (gzip.compress(TEXT, mtime=0)[:-9], "is damaged after .* bytes of text"),
        (gzip.compress(TEXT, mtime=0) + b"more", "is damaged after .* bytes of text"),
        (b"PK\x03\x04" + b"a" * 400, "is a zip archive, not text"),
        (bz2.compress(b"text " * 400), "is a bzip2 archive, not text"),
        (lzma.compress(b"text " * 400), "is a xz archive, not text"),
        (b"\x28\xb5\x2f\xfd" + b"a" * 400, "is damaged after 0 bytes of text"),
        (zstandard.compress(TEXT)[:-3], "is damaged after .* bytes of text .*in the middle of a zstd frame"),
        (tar_of(tarfile.USTAR_FORMAT), "is a tar archive, not text"),
        (tar_of(tarfile.GNU_FORMAT), "is a tar archive, not text"),
    ],
)
def test_unusable_texts(tmp_path, text, message):
    with pytest.raises(UserError, match=rf"corpus.path=.*text.txt: .*{message}"):
        prepare(file_config(tmp_path, text, Tokens.txl))
    assert not list(tmp_path.glob("cache/corpora/*"))


def test_missing_file_folder_and_unwritable_cache(tmp_path):
    cache = str(tmp_path / "cache")
    with pytest.raises(UserError, match=r"corpus.path=nowhere: no such file"):
        prepare(CorpusConfig(Corpus.file, "nowhere", cache_dir=cache))
    with pytest.raises(UserError, match=r"corpus.path=.*: not a file"):
        prepare(CorpusConfig(Corpus.file, "/dev/null", cache_dir=cache))
    with pytest.raises(UserError, match=r"corpus.path=.*: no files in this folder"):
        prepare(CorpusConfig(Corpus.file, str(tmp_path), cache_dir=cache))
    with pytest.raises(UserError, match=r"corpus.path=.*\*.txt: no file matches"):
        prepare(CorpusConfig(Corpus.file, str(tmp_path / "*.txt"), cache_dir=cache))
    config = file_config(tmp_path)
    Path(cache).write_text("a file where a folder should be")
    with pytest.raises(UserError, match=r"corpus.cache_dir=.*cannot be written \(Not a directory\)"):
        prepare(config)


def test_stdlib_is_the_sources_without_tests(tmp_path):
    made = prepare(CorpusConfig(cache_dir=str(tmp_path)))
    root, skipped = Path(sysconfig.get_paths()["stdlib"]), {"test", "tests", "idlelib"}
    names = []
    for folder, _, files in os.walk(root):
        here = Path(folder).relative_to(root)
        if not (skipped | {"site-packages"}) & set(here.parts):
            names += [(here / name).as_posix() for name in files if name.endswith(".py")]
    text = b"".join((root / name).read_bytes() for name in sorted(names))
    assert made.sha256 == hashlib.sha256(text).hexdigest()
    assert made.meta["python"].startswith("3.")


def test_enwik8_missing_wrong_prefix_and_whole(tmp_path, monkeypatch):
    config = CorpusConfig(Corpus.enwik8, cache_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"python -m launch.prepare corpus=enwik8.*corpus.path"):
        prepare(config)
    copy = enwik8_copy(config)
    copy.parent.mkdir(parents=True)
    copy.write_bytes(TEXT)
    with pytest.raises(UserError, match="corpus=enwik8: neither enwik8 nor a prefix"):
        prepare(config)
    copy.write_bytes(b"<mediawiki " + TEXT)
    assert "prefix of enwik8" in prepare(config).notes[0]
    monkeypatch.setattr(corpus, "ENWIK8_BYTES", len(TEXT) + 11)
    with pytest.raises(UserError, match="neither enwik8"):
        prepare(config)
    monkeypatch.setattr(corpus, "ENWIK8_SHA256", hashlib.sha256(copy.read_bytes()).hexdigest())
    assert prepare(config).notes == []


def test_whole_enwik8_is_cut_at_90_and_95_million():
    n = ENWIK8_BYTES
    assert n == 100_000_000
    assert (n * 90 // 100, n * 95 // 100) == (90_000_000, 95_000_000)


def test_enwik8_prefix(tmp_path):
    data = os.environ.get("FOREROUTE_DATA")
    if not data:
        pytest.skip("FOREROUTE_DATA is unset")
    path = Path(data) / "enwik8_prefix" / "enwik8.first4154394"
    made = prepare(CorpusConfig(Corpus.enwik8, str(path), Tokens.txl, str(tmp_path)))
    for split, part in zip(Split, plain_parts(path.read_bytes()), strict=True):
        assert made.vocab.decode(made.split(split)) == part.replace(b"\n", b"")


class _Handler(http.server.BaseHTTPRequestHandler):
    """Serves `server.body`, with ranges unless told otherwise; cuts the connection after `server.cut` bytes."""

    def do_GET(self):
        body, first = self.server.body, 0
        wanted = self.headers["Range"]
        self.server.ranges.append(wanted)
        if wanted and self.server.has_ranges:
            first = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if first >= len(body):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        if self.server.says_length:
            self.send_header("Content-Length", str(len(body) - first))
        self.end_headers()
        self.wfile.write(body[first:][: self.server.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, 30_000, dtype=np.uint8).tobytes()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("enwik8", noise)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as it:
        it.body, it.cut, it.has_ranges, it.ranges = buffer.getvalue(), None, True, []
        it.says_length = True
        it.text, it.sha256 = noise, hashlib.sha256(noise).hexdigest()
        it.url = f"http://127.0.0.1:{it.server_port}/enwik8.zip"
        thread = threading.Thread(target=it.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield it
        it.shutdown()
        thread.join()


def test_download_reports_progress_and_leaves_only_the_file(tmp_path, server):
    target, seen = tmp_path / "downloads" / "enwik8", []
    download_enwik8(target, server.url, sha256=server.sha256, progress=lambda *step: seen.append(step))
    assert target.read_bytes() == server.text
    assert seen[-1] == (len(server.body), len(server.body))
    assert list(target.parent.iterdir()) == [target]
    download_enwik8(target, "http://127.0.0.1:1/never", sha256="not asked")


def test_download_of_unknown_length_says_so(tmp_path, server):
    server.says_length, seen = False, []
    target = tmp_path / "enwik8"
    download_enwik8(target, server.url, sha256=server.sha256, progress=lambda *step: seen.append(step))
    assert target.read_bytes() == server.text and seen[-1] == (len(server.body), 0)


@pytest.mark.parametrize("has_ranges", [True, False])
def test_download_goes_on_after_a_cut(tmp_path, server, has_ranges):
    target, server.has_ranges = tmp_path / "enwik8", has_ranges
    server.cut = 10_000
    with pytest.raises(UserError, match=r"download failed \(connection lost after 10,000 of"):
        download_enwik8(target, server.url, sha256=server.sha256)
    assert not target.exists()
    assert (tmp_path / "enwik8.zip.part").read_bytes() == server.body[:10_000]
    server.cut = None
    download_enwik8(target, server.url, sha256=server.sha256)
    assert server.ranges == [None, "bytes=10000-"]
    assert target.read_bytes() == server.text


def test_download_of_a_complete_part_only_unzips(tmp_path, server):
    (tmp_path / "enwik8.zip.part").write_bytes(server.body)
    download_enwik8(tmp_path / "enwik8", server.url, sha256=server.sha256)
    assert (tmp_path / "enwik8").read_bytes() == server.text


@pytest.mark.parametrize("broken", ["other text", "no zip", "empty zip", "flipped bit"])
def test_wrong_content_is_deleted(tmp_path, server, broken):
    sha256 = server.sha256
    if broken == "other text":
        sha256 = "0" * 64
    elif broken == "no zip":
        server.body = b"<html>moved</html>"
    elif broken == "empty zip":
        server.body = b"PK\5\6" + bytes(18)
    else:
        server.body = server.body[:9000] + bytes([server.body[9000] ^ 1]) + server.body[9001:]
    with pytest.raises(UserError, match=f"SHA-256 of the unzipped file is .*, expected {sha256}"):
        download_enwik8(tmp_path / "enwik8", server.url, sha256=sha256)
    assert list(tmp_path.iterdir()) == []


def test_unreachable_server_keeps_what_arrived(tmp_path):
    (tmp_path / "enwik8.zip.part").write_bytes(b"kept")
    with pytest.raises(UserError, match=r"http://127.0.0.1:1/x: download failed .*run again"):
        download_enwik8(tmp_path / "enwik8", "http://127.0.0.1:1/x", sha256="")
    assert (tmp_path / "enwik8.zip.part").read_bytes() == b"kept"


def test_meta_json_is_plain(tmp_path):
    prepare(file_config(tmp_path))
    (path,) = (tmp_path / "cache" / "corpora").glob("*/meta.json")
    meta = json.loads(path.read_text())
    assert meta["cuts"] == meta["unit_cuts"] == [0, len(TEXT) * 90 // 100, len(TEXT) * 95 // 100, len(TEXT)]
    assert (meta["format"], meta["dtype"]) == (4, "uint8")
    assert meta["ids_sha256"] == hashlib.sha256(TEXT).hexdigest()
    assert (meta["corpus"], meta["tokens"], meta["source"]) == ("file", "bytes", "text.txt")
