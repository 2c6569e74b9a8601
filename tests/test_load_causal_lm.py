"""load_causal_lm: local folders, the Hub (a stand-in on this machine), no network; with `assets`, the real models."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

from isouq.studies import assets

FIRST, SECOND = "1" * 40, "2" * 40  # commits of the stand-in Hub's one repository


def save_tiny_model(folder: Path, *, vocab: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "hello": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)


@pytest.fixture(scope="module")
def commits(tmp_path_factory):
    """Folders of the repository at its two commits; the vocabulary's size tells which is which."""
    root = tmp_path_factory.mktemp("commits")
    for commit, vocab in ((FIRST, 11), (SECOND, 22)):
        save_tiny_model(root / commit, vocab=vocab)
    return root


@pytest.fixture(scope="module")
def hub(commits):
    """A stand-in for huggingface.co that has owner/tiny, where main and v2 are the second commit."""
    revisions = {"main": SECOND, "v2": SECOND, "v1": FIRST, FIRST: FIRST, SECOND: SECOND}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, *, body):
            path = unquote(self.path.split("?")[0])
            for revision, commit in revisions.items():
                if path == f"/api/models/owner/tiny/revision/{revision}":
                    names = [{"rfilename": file.name} for file in (commits / commit).iterdir()]
                    return self.send(
                        json.dumps({"id": "owner/tiny", "sha": commit, "siblings": names}).encode(), {}, body
                    )
                prefix = f"/owner/tiny/resolve/{revision}/"
                file = commits / commit / path.removeprefix(prefix)
                if path.startswith(prefix) and file.is_file():
                    content = file.read_bytes()
                    tag = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit}
                    return self.send(content, tag, body)
            kind = "Entry" if "/revision/" not in path else "Revision" if "owner/tiny" in path else "Repo"
            return self.send(b"{}", {"X-Error-Code": f"{kind}NotFound"}, body, status=404)

        def send(self, content, headers, body, status=200):
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def load_in_child(names: list[str], **environment: str) -> list[dict]:
    """Load each name in a new process (the Hub's address is read at import); what came of it, and in what time."""
    script = """
import json, sys, time
from isouq.studies import assets
import transformers
for name in sys.argv[1:]:
    began = time.monotonic()
    try:
        model, tokenizer = assets.load_causal_lm(name)
        found = {"vocab": model.config.vocab_size, "ids": tokenizer("hello")["input_ids"], "dtype": str(model.dtype)}
    except assets.AssetError as error:
        found = {"error": str(error)}
    print("found", json.dumps({**found, "seconds": time.monotonic() - began}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, *names],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("found ")]


def test_a_local_folder_is_loaded_as_float32_in_evaluation_mode(commits):
    model, tokenizer = assets.load_causal_lm(str(commits / FIRST))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert tokenizer("hello hello")["input_ids"] == [1, 1]


def test_a_folder_without_a_model_is_refused_by_name(tmp_path):
    with pytest.raises(assets.AssetError, match=f"transformers cannot load '{tmp_path}' as a causal language"):
        assets.load_causal_lm(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135m", r"did you mean the asset 'smollm2-135m-instruct'\?"),
        ("SmolLM2-135M-Instruct", r"did you mean the asset 'smollm2-135m-instruct'\?"),
        ("triviaqa", "triviaqa is no causal language model but 'data'; those are smollm2-135m-instruct, gemma-3"),
        ("./nowhere", "is no folder, no asset .* and no Hub id"),
        ("a/b/c", "is no folder, no asset .* and no Hub id"),
        ("", "is no folder, no asset .* and no Hub id"),
    ],
)
def test_a_name_that_cannot_be_a_model_is_refused_before_any_request(name, message):
    with pytest.raises(assets.AssetError, match=message):
        assets.load_causal_lm(name)


def test_the_hub_is_asked_at_the_revision(hub, tmp_path):
    names = ["owner/tiny", "owner/tiny@v1", f"owner/tiny@{FIRST}", "owner/tiny@v3", "owner/none"]
    *loaded, no_revision, no_repository = load_in_child(names, HF_ENDPOINT=hub, HF_HOME=str(tmp_path))
    assert [found["vocab"] for found in loaded] == [22, 11, 11]
    assert all(found["ids"] == [1] and found["dtype"] == "torch.float32" for found in loaded)
    assert "the Hub has no 'owner/tiny@v3' for you: 404 Client Error. Revision Not Found" in no_revision["error"]
    assert "the Hub has no 'owner/none' for you: 404 Client Error. Repository Not Found" in no_repository["error"]


def test_without_a_network_the_hub_fails_soon_and_its_cache_still_works(hub, tmp_path):
    load_in_child([f"owner/tiny@{FIRST}"], HF_ENDPOINT=hub, HF_HOME=str(tmp_path))
    names = [f"owner/tiny@{FIRST}", "owner/tiny@v1", "owner/none"]
    for environment in ({"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        cached, absent, none = load_in_child(names, HF_HOME=str(tmp_path), **environment)
        assert cached["vocab"] == 11
        for found in (absent, none):
            assert "no network: cannot reach the Hub" in found["error"]
            assert "an asset (smollm2-135m-instruct, gemma-3-270m) or a local folder" in found["error"]
            assert found["seconds"] < 10


# ---- what a name stands for ---------------------------------------------------------------------------


def test_a_folders_content_follows_its_bytes_and_not_its_place_or_times(commits, tmp_path):
    folder = shutil.copytree(commits / FIRST, tmp_path / "a model")
    first = assets.content(str(folder))
    assert first == assets.content(str(commits / FIRST)) != assets.content(str(commits / SECOND))
    weights = folder / "model.safetensors"
    before = weights.stat()
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")  # as large as it was
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert assets.content(str(folder)) != first
    shutil.copy(commits / FIRST / "model.safetensors", weights)
    (folder / ".cache").write_text("x")
    assert assets.content(str(folder)) == first
    (folder / "config.json").rename(folder / "other.json")
    assert assets.content(str(folder)) != first


def test_an_assets_content_is_its_pin_and_needs_no_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ISOUQ_CACHE", str(tmp_path))
    assert assets.content("smollm2-135m-instruct") != assets.content("gemma-3-270m")
    assert list(tmp_path.iterdir()) == []


def test_a_hub_id_stands_for_a_commit_also_later_without_a_network(hub, tmp_path):
    script = "import sys; from isouq import assets; print([assets.content(name) for name in sys.argv[1:]])"

    def content(*names: str, **environment: str) -> subprocess.CompletedProcess:
        options = {"env": {**os.environ, "HF_HOME": str(tmp_path), **environment}, "text": True, "capture_output": True}
        return subprocess.run([sys.executable, "-c", script, *names], **options)

    names = ["owner/tiny", "owner/tiny@v1", f"owner/tiny@{FIRST}"]
    for environment in ({"HF_ENDPOINT": hub}, {"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}):
        assert content(*names, **environment).stdout.strip() == str([SECOND, FIRST, FIRST])
        unknown = content("owner/tiny@v3", **environment)
        assert unknown.returncode == 1
        assert ("the Hub has no 'owner/tiny@v3'" in unknown.stderr) == (environment.get("HF_ENDPOINT") == hub)
    (loaded,) = load_in_child(["owner/tiny"], HF_ENDPOINT=hub, HF_HOME=str(tmp_path))
    (again,) = load_in_child(["owner/tiny"], HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    assert loaded["vocab"] == again["vocab"] == 22


# ---- the real ones ------------------------------------------------------------------------------------


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.assets
@pytest.mark.parametrize(
    ("name", "n_parameters"), [("smollm2-135m-instruct", 134_515_008), ("gemma-3-270m", 268_098_176)]
)
def test_a_real_model_is_float32_tied_and_in_evaluation_mode(name, n_parameters):
    model, _ = assets.load_causal_lm(name)
    parameters = list(model.parameters())
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert sum(parameter.numel() for parameter in parameters) == n_parameters
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert not model.training
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.assets
def test_smollm2_answers_a_question():
    model, tokenizer = assets.load_causal_lm("smollm2-135m-instruct")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(ids)


@pytest.mark.assets
def test_a_new_conversion_gives_the_same_weights_and_token_ids(tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    name, questions = "smollm2-135m-instruct", json.loads(assets.path("truthfulqa").read_text())
    source = assets.cache_folder() / name / "source"
    old = assets.path(name, "model.safetensors")
    shutil.copytree(source, tmp_path / name / "source")
    monkeypatch.setenv("ISOUQ_CACHE", str(tmp_path))
    new = assets.path(name)
    assert sha256(new / "model.safetensors") == sha256(old)
    texts = [str(example) for example in questions["examples"]]
    from_gguf = AutoTokenizer.from_pretrained(source, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    saved = AutoTokenizer.from_pretrained(new)
    assert saved(texts)["input_ids"] == from_gguf(texts)["input_ids"]
    assert saved.chat_template == from_gguf.chat_template
    assert saved.chat_template


@pytest.mark.assets
def test_minilm_puts_like_sentences_close():
    from transformers import AutoModel, AutoTokenizer

    folder = assets.path("all-minilm-l6-v2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        ["Paris is the capital of France.", "France's capital is Paris.", "Cats sleep."],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder)(**batch).last_hidden_state
    weight = batch["attention_mask"].unsqueeze(-1)
    mean = torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=1)
    similarity = mean @ mean.T
    assert similarity[0, 1] > 0.9
    assert similarity[0, 2] < 0.3
