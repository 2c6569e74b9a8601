"""Fetching, verifying and converting assets, through real pip on a small index; with `assets`, the real ones."""

import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tokenizers

import package_index
from isouq.studies import assets
from isouq.studies.assets import pip

# What a child process runs: fetch from the test's index, after a line of its own.
CHILD = """
import sys, time
from pathlib import Path
from isouq.studies import assets
from isouq.studies.assets import manifest, pip
manifest.FILE = Path(sys.argv[1])
assets._dequantise = lambda source, file, folder, tied: (folder.mkdir(parents=True), (folder / "w").write_text("w"))
def hang(*args, **options):
    print("here", flush=True)
    time.sleep(600)
{before}
assets.fetch(sys.argv[2], progress=False)
"""


@pytest.fixture
def index(tmp_path, monkeypatch):
    return package_index.enter(tmp_path, monkeypatch)


def stand_in(patch: pytest.MonkeyPatch) -> list[Path]:
    """Stand in for the conversion of a GGUF file; the list grows by the source file at each."""
    made = []

    def dequantise(source, file, folder, tied):
        made.append(source / file)
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"float32 " + (source / file).read_bytes())

    patch.setattr(assets, "_dequantise", dequantise)
    return made


@pytest.fixture
def conversions(monkeypatch):
    return stand_in(monkeypatch)


@pytest.fixture(scope="module")
def fetched(tmp_path_factory) -> Path:
    """A cache that pip has filled once; every run of it takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        index = package_index.enter(tmp_path_factory.mktemp("fetched"), patch)
        assets.fetch(["notes", "toy-lm"], progress=False)
    return index.cache


@pytest.fixture
def filled(index, fetched):
    """An index whose cache holds the notes and the model already."""
    shutil.copytree(fetched, index.cache)
    return index


@pytest.fixture
def downloads(monkeypatch):
    """Count the downloads: the list grows by the package's name at each."""
    made, real = [], pip.download

    def download(package, scratch, progress):
        made.append(package.name)
        return real(package, scratch, progress)

    monkeypatch.setattr(pip, "download", download)
    return made


def tree(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} - {".lock"}


def start(index, name: str, before: str = "", **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-c", CHILD.format(before=before), str(index.manifest), name]
    return subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)


# ---- fetching -----------------------------------------------------------------------------------------


def test_only_the_named_members_are_kept(index):
    assets.fetch("notes")
    assert tree(index.cache) == {"notes/source/a.txt", "notes/source/b.txt"}
    assert assets.path("notes").read_bytes() == package_index.NOTES
    assert assets.path("notes", "b.txt").read_bytes() == package_index.SECOND


def test_a_member_in_parts_is_joined_in_order(index):
    assert assets.path("half").read_bytes() == package_index.FRONT + package_index.BACK


def test_assets_of_one_sdist_share_its_download_by_the_pip_it_names(index, downloads):
    assets.fetch(["sourced", "other"])
    assert downloads == ["fake-source", "fake-pip"]
    assert (index.archives.parent / "via").read_text() == "download"
    assert assets.path("sourced").read_bytes() == package_index.SOURCED
    assert assets.path("other").read_bytes() == package_index.OTHER


def test_without_names_everything_is_fetched_once(index, downloads, conversions):
    assets.fetch()
    assert set(assets.verify().values()) == {"verified"}
    assets.fetch()
    assert sorted(downloads) == ["fake-back", "fake-front", "fake-model", "fake-notes", "fake-pip", "fake-source"]
    assert len(conversions) == 1


def test_licence_and_size_are_shown_before_the_download(index, monkeypatch, capsys):
    def refuse(package, scratch, progress):
        raise assets.AssetError("not now")

    monkeypatch.setattr(pip, "download", refuse)
    with pytest.raises(assets.AssetError, match="not now"):
        assets.fetch("half")
    shown = capsys.readouterr().err
    assert "licence CC0-1.0" in shown
    assert "Halves have terms: accept them." in shown
    assert re.search(r"\d\.\d+kB from fake-front==1\.0, fake-back==1\.0", shown)


def test_pips_own_words_go_to_standard_error(index, capfd):
    assets.fetch("notes")
    shown = capfd.readouterr()
    assert "fake_notes-1.0-py3-none-any.whl" in shown.err
    assert shown.out == ""


def test_quiet_without_progress(index, capfd):
    assets.fetch("notes", progress=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "nearest"), [("note", "did you mean 'notes'"), ("zzzzzz", "the assets are notes, half")]
)
@pytest.mark.parametrize("use", [assets.fetch, assets.verify, assets.path, assets.is_cached])
def test_an_unknown_name_is_refused_with_the_nearest(index, use, name, nearest):
    with pytest.raises(assets.AssetError, match=f"unknown asset '{name}'.*{nearest}"):
        use(name)


def test_an_unknown_file_of_an_asset_is_refused(index):
    with pytest.raises(assets.AssetError, match=r"notes has no file 'c\.txt'; it has a\.txt, b\.txt"):
        assets.path("notes", "c.txt")


def test_the_cache_is_the_users_unless_the_variable_names_another(monkeypatch, tmp_path):
    monkeypatch.setenv("ISOUQ_CACHE", str(tmp_path / "mine"))
    assert assets.cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("ISOUQ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_folder().name == "isouq"
    if sys.platform == "linux":
        assert assets.cache_folder() == tmp_path / "xdg" / "isouq"


def test_a_cache_that_cannot_be_written_is_said_by_name(index, monkeypatch, tmp_path):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("ISOUQ_CACHE", str(tmp_path / "a file" / "cache"))
    with pytest.raises(assets.AssetError, match=r"cannot write the cache folder .*a file.*ISOUQ_CACHE"):
        assets.fetch("notes")


def test_a_complete_cache_is_not_written_to(filled, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError("read-only")

    monkeypatch.setattr(assets.filelock, "FileLock", refuse)
    assets.fetch("notes")
    assert assets.path("notes").read_bytes() == package_index.NOTES


# ---- wrong bytes --------------------------------------------------------------------------------------


def flip_last_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_corrupt_archive_is_refused(index):
    archive = index.archives / "fake_notes-1.0-py3-none-any.whl"
    expected = sha256(archive)
    with archive.open("ab") as out:
        out.write(b"\0")
    with pytest.raises(assets.AssetError) as refusal:
        assets.fetch("notes")
    assert all(text in str(refusal.value) for text in (archive.name, expected, sha256(archive), "PIP_INDEX_URL"))
    assert tree(index.cache) == set()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_corrupt_file_in_the_cache_is_refused_and_replaced(filled, damage):
    file = assets.path("notes")
    if damage == "flip":
        flip_last_byte(file)
        pattern = f"expected SHA-256 {hashlib.sha256(package_index.NOTES).hexdigest()}, got {sha256(file)}"
    elif damage == "truncate":
        file.write_bytes(package_index.NOTES[:-1])
        pattern = f"expected {len(package_index.NOTES)} bytes, got {len(package_index.NOTES) - 1}"
    else:
        file.unlink()
        pattern = "it is missing"
    for use in (assets.path, assets.verify):
        with pytest.raises(assets.AssetError, match=pattern) as refusal:
            use("notes")
        assert str(file) in str(refusal.value)
        assert "`isouq assets fetch notes` replaces it" in str(refusal.value)
    before = tree(filled.cache) | {"notes/source/a.txt"}
    assets.fetch("notes")
    assert assets.path("notes").read_bytes() == package_index.NOTES
    assert tree(filled.cache) == before


def test_verify_hashes_again_even_when_size_and_time_are_the_same(filled):
    file = assets.path("notes")
    stat = file.stat()
    flip_last_byte(file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(assets.AssetError, match="expected SHA-256"):
        assets.verify("notes")
    assets.fetch("notes")
    assert assets.verify("notes") == {"notes": "verified"}


def test_bytes_that_the_manifest_does_not_name_are_not_kept(index):
    wrong = hashlib.sha256(b"other bytes").hexdigest()
    right = hashlib.sha256(package_index.NOTES).hexdigest()
    index.manifest.write_text(index.manifest.read_text().replace(right, wrong))
    with pytest.raises(assets.AssetError, match=f"expected SHA-256 {wrong}, got {right}"):
        assets.fetch("notes")
    assert tree(index.cache) == set()


def test_a_member_that_the_archive_lacks_is_named(index):
    index.manifest.write_text(index.manifest.read_text().replace("notes/b.txt", "notes/z.txt"))
    with pytest.raises(assets.AssetError, match=r"fake_notes-1\.0-py3-none-any\.whl has no member notes/z\.txt"):
        assets.fetch("notes")


# ---- no network ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/simple", "https://nowhere.invalid/simple"])
def test_no_network_is_one_line_with_the_way_out_and_soon(index, monkeypatch, url):
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_INDEX_URL", url)
    began = time.monotonic()
    with pytest.raises(assets.AssetError, match=r"no network.*PIP_FIND_LINKS.*fake_notes.*ISOUQ_CACHE") as refusal:
        assets.fetch("notes")
    assert "\n" not in str(refusal.value)
    assert time.monotonic() - began < 20
    assert tree(index.cache) == set()


def test_an_index_without_the_package_is_said(index):
    (index.archives / "fake_notes-1.0-py3-none-any.whl").unlink()
    with pytest.raises(assets.AssetError, match=r"pip failed: No matching distribution found for fake-notes==1\.0"):
        assets.fetch("notes")


# ---- kills, and two at once ---------------------------------------------------------------------------


@pytest.fixture
def stalling_index(index):
    """An index over HTTP that sends half of the wheel, then nothing more; `sent` tells when."""
    wheel = (index.archives / "fake_notes-1.0-py3-none-any.whl").read_bytes()
    sent, release = threading.Event(), threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            page = b'<a href="/fake_notes-1.0-py3-none-any.whl">fake_notes-1.0-py3-none-any.whl</a>'
            archive = self.path.endswith(".whl")
            self.send_response(200)
            self.send_header("Content-Type", "application/octet-stream" if archive else "text/html")
            self.send_header("Content-Length", str(len(wheel if archive else page)))
            self.end_headers()
            self.wfile.write(wheel[: len(wheel) // 2] if archive else page)
            self.wfile.flush()
            if archive:
                sent.set()
                release.wait(60)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/simple", sent
    release.set()
    server.shutdown()


def test_a_fetch_killed_during_the_download_leaves_nothing_in_the_way(index, monkeypatch, stalling_index):
    url, sent = stalling_index
    with monkeypatch.context() as patch:
        for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS"):
            patch.delenv(name)
        child = start(index, "notes", PIP_INDEX_URL=url)
    assert sent.wait(30)
    child.kill()
    child.wait()
    assert list((index.cache / ".partial").iterdir()), "the kill was meant to come half way"
    assert assets.verify("notes") == {"notes": "absent"}
    assert assets.path("notes").read_bytes() == package_index.NOTES
    assert tree(index.cache) == {"notes/source/a.txt", "notes/source/b.txt"}


@pytest.mark.parametrize("step", ["_assemble", "_move_into_place", "_dequantise"])
def test_a_fetch_killed_at_a_later_step_leaves_nothing_in_the_way(index, conversions, step):
    child = start(index, "toy-lm", before=f"assets.{step} = hang")
    assert child.stdout.readline() == "here\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not assets.is_cached("toy-lm")
    assert (index.cache / ".partial").is_dir(), "the kill was meant to come half way"
    assets.fetch("toy-lm")
    assert assets.verify("toy-lm") == {"toy-lm": "verified"}
    files = {"source/toy.gguf", "float32/model.safetensors", "float32/conversion.json"}
    assert tree(index.cache) == {f"toy-lm/{file}" for file in files}


def test_an_interrupted_fetch_ends_pip_and_cleans_up(index, monkeypatch, stalling_index):
    url, sent = stalling_index
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name)
    before = """
import atexit, subprocess
real, processes = subprocess.Popen, []
pip.subprocess.Popen = lambda *args, **options: processes.append(real(*args, **options)) or processes[0]
atexit.register(lambda: print(processes[0].poll()))
"""
    child = start(index, "notes", before=before, PIP_INDEX_URL=url)
    assert sent.wait(30)
    child.send_signal(signal.SIGINT)  # not to the group: pip is to be ended by its parent
    assert child.wait(30) != 0
    assert int(child.stdout.read()) != 0  # "None" if pip still ran
    assert [file.name for file in index.cache.iterdir()] == [".lock"]


def test_two_processes_at_once_download_once(index, tmp_path):
    log = tmp_path / "downloads"
    count = f"""
real = pip.download
def download(*args):
    with open({str(log)!r}, "a") as out:
        out.write("one\\n")
    time.sleep(1)
    return real(*args)
pip.download = download
"""
    children = [start(index, "notes", before=count) for _ in range(2)]
    assert [child.wait(60) for child in children] == [0, 0]
    assert log.read_text() == "one\n"
    assert assets.verify("notes") == {"notes": "verified"}


# ---- conversion ---------------------------------------------------------------------------------------


def test_conversion_is_recorded_and_verified(filled):
    folder = assets.path("toy-lm")
    assert folder == filled.cache / "toy-lm" / "float32"
    record = json.loads((folder / "conversion.json").read_text())
    file = folder / "model.safetensors"
    assert record["files"] == {file.name: {"sha256": sha256(file), "size": file.stat().st_size}}
    assert record["source"] == {"toy.gguf": hashlib.sha256(package_index.GGUF).hexdigest()}
    flip_last_byte(file)
    for use in (assets.path, assets.verify):
        with pytest.raises(assets.AssetError, match=f"toy-lm: .*{file.name} is corrupt: expected SHA-256"):
            use("toy-lm")


@pytest.mark.parametrize("damage", ["no record", "no json", "other source", "gone"])
def test_a_bad_conversion_is_made_again_without_a_download(filled, conversions, downloads, damage):
    record = assets.path("toy-lm") / "conversion.json"
    if damage == "no record":
        record.unlink()
    elif damage == "no json":
        record.write_text("{")
    elif damage == "other source":
        record.write_text(record.read_text().replace(hashlib.sha256(package_index.GGUF).hexdigest(), "0" * 64))
    else:
        shutil.rmtree(record.parent)
    if damage == "gone":
        assert assets.verify("toy-lm") == {"toy-lm": "absent"}
    else:
        with pytest.raises(assets.AssetError, match=r"toy-lm: .* is corrupt"):
            assets.verify("toy-lm")
    assets.fetch("toy-lm")
    assert assets.verify("toy-lm") == {"toy-lm": "verified"}
    assert (len(downloads), len(conversions)) == (0, 1)


# ---- the manifest itself ------------------------------------------------------------------------------


def test_the_manifest_pins_every_byte():
    found = {asset.name: asset for asset in assets.list_assets()}
    assert list(found) == [
        "smollm2-135m-instruct",
        "gemma-3-270m",
        "qwen-coder-0-5b-instruct",
        "qwen-coder-1-5b-instruct",
        "triviaqa",
        "truthfulqa",
        "wikidata",
        "all-minilm-l6-v2",
    ]
    for asset in found.values():
        assert asset.licence
        assert asset.used_for
        for pinned in (*asset.packages, *asset.members):
            assert re.fullmatch("[0-9a-f]{64}", pinned.sha256)
            assert pinned.size > 0
    assert "Gemma Terms of Use" in found["gemma-3-270m"].notice


# ---- the real ones ------------------------------------------------------------------------------------


@pytest.mark.assets
def test_every_real_asset_has_the_pinned_bytes():
    """But for the largest, of which a conversion holds 13 GB."""
    names = [asset.name for asset in assets.list_assets() if asset.name != "qwen-coder-1-5b-instruct"]
    assets.fetch(names, progress=False)
    assert set(assets.verify(names).values()) == {"verified"}


def test_a_file_that_holds_embedding_and_head_apart_needs_a_word_which_is_meant(tmp_path, monkeypatch):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=20, **small, tie_word_embeddings=False)
    config.quantization_config = None
    loaded = transformers.LlamaForCausalLM(config)
    head = loaded.lm_head.weight.detach().clone()
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    real = transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **o: loaded)
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda *a, **o: tokenizer if "gguf_file" in o else real(*a, **o)
    )
    with pytest.raises(assets.AssetError, match=r"two\.gguf: embedding and head are stored apart; `tied` in"):
        assets._dequantise(tmp_path, "two.gguf", tmp_path / "apart")
    assert not (tmp_path / "apart").exists()
    loaded.config.quantization_config = None
    assets._dequantise(tmp_path, "two.gguf", tmp_path / "one", tied="lm_head.weight")
    saved = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "one")
    assert saved.config.tie_word_embeddings
    assert torch.equal(saved.get_input_embeddings().weight, head)
    assert saved.lm_head.weight is saved.get_input_embeddings().weight
