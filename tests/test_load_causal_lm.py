"""load_causal_lm: local folders, the Hub (a stand-in on this machine), no network; with `assets`, the real models."""

import hashlib
import http.server
import json
import os
import shutil
import threading
import time
from pathlib import Path
from urllib.parse import unquote

import pytest
import safetensors.torch
import torch

from isouq.models import ModelError
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


@pytest.fixture
def visit(hub, monkeypatch, tmp_path):
    """Puts the Hub's client, with a cache of its own, before the stand-in, a port that refuses, or offline."""
    from huggingface_hub import constants

    def set_up(where: str) -> None:
        endpoint = hub if where == "hub" else "http://127.0.0.1:9"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", where == "offline")

    return set_up


NO_NETWORK = ("refused", "offline")


def test_a_local_folder_is_loaded_as_float32_in_evaluation_mode(commits):
    model, tokenizer = assets.load_causal_lm(str(commits / FIRST))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training
    assert tokenizer("hello hello")["input_ids"] == [1, 1]


def test_a_dtype_and_a_device_map_are_taken_and_others_refused_by_name(commits, monkeypatch):
    model, _ = assets.load_causal_lm(str(commits / FIRST), dtype="bfloat16", device_map="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training
    with pytest.raises(ValueError, match=r"dtype: 'bfloat61' given, one of auto, float32, bfloat16, .* wanted"):
        assets.load_causal_lm(str(commits / FIRST), dtype="bfloat61")
    with pytest.raises(ModelError, match=r"as a causal language model: .* found everywhere"):
        assets.load_causal_lm(str(commits / FIRST), device_map="everywhere")


def test_two_stored_heads_that_differ_are_refused_where_the_config_ties_them(commits, tmp_path):
    folder = shutil.copytree(commits / FIRST, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(ModelError, match="its config ties embedding and head, its weights hold two that differ; "):
        assets.load_causal_lm(str(folder))
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model, _ = assets.load_causal_lm(str(folder))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_folder_without_a_model_is_refused_by_name(tmp_path):
    with pytest.raises(ModelError, match=f"transformers cannot load '{tmp_path}' as a causal language"):
        assets.load_causal_lm(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135m", r"did you mean the asset 'smollm2-135m-instruct'\?"),
        ("SmolLM2-135M-Instruct", r"did you mean the asset 'smollm2-135m-instruct'\?"),
        ("triviaqa", "triviaqa is no causal language model but 'data'; those are smollm2-135m-instruct, gemma-3"),
        ("./nowhere", "is no folder, no asset .* and no Hub id"),
        ("a/b/c", "is no folder, no asset .* and no Hub id"),
        ("", "is no folder.* and no Hub id"),
    ],
)
def test_a_name_that_cannot_be_a_model_is_refused_before_any_request(name, message):
    with pytest.raises(ModelError, match=message):
        assets.load_causal_lm(name)


def test_the_hub_is_asked_at_the_revision(visit):
    visit("hub")
    for name, vocab in (("owner/tiny", 22), ("owner/tiny@v1", 11), (f"owner/tiny@{FIRST}", 11)):
        model, tokenizer = assets.load_causal_lm(name)
        assert (model.config.vocab_size, model.dtype, model.training) == (vocab, torch.float32, False)
        assert tokenizer("hello")["input_ids"] == [1]
    assert assets.load_causal_lm("owner/tiny", revision="v1")[0].config.vocab_size == 11
    with pytest.raises(ModelError, match=r"'owner/tiny@v2@v1' is no folder, .* no Hub id \(owner/name@revision\)"):
        assets.load_causal_lm("owner/tiny@v2", revision="v1")
    for name, kind in (("owner/tiny@v3", "Revision"), ("owner/none", "Repository")):
        with pytest.raises(ModelError, match=f"the Hub has no '{name}' for you: 404 Client Error. {kind} Not Found"):
            assets.load_causal_lm(name)


@pytest.mark.parametrize("where", NO_NETWORK)
def test_without_a_network_the_hub_fails_soon_and_its_cache_still_works(visit, where):
    visit("hub")
    for name in ("owner/tiny", f"owner/tiny@{FIRST}"):
        assets.load_causal_lm(name)
    visit(where)
    for name, vocab in (("owner/tiny", 22), (f"owner/tiny@{FIRST}", 11)):
        assert assets.load_causal_lm(name)[0].config.vocab_size == vocab
    began = time.monotonic()
    for name in ("owner/tiny@v1", "owner/none", f"owner/none@{SECOND}"):
        with pytest.raises(ModelError, match=r"no network: cannot reach the Hub .* local folder or an asset .*works"):
            assets.load_causal_lm(name)
    assert time.monotonic() - began < 10


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


@pytest.mark.parametrize("where", NO_NETWORK)
def test_a_hub_id_stands_for_a_commit_also_later_without_a_network(visit, where):
    names = ["owner/tiny", "owner/tiny@v1", f"owner/tiny@{FIRST}"]
    for place, message in (("hub", "the Hub has no 'owner/tiny@v3'"), (where, "no network: cannot reach the Hub")):
        visit(place)
        assert [assets.content(name) for name in names] == [SECOND, FIRST, FIRST]
        with pytest.raises(ModelError, match=message):
            assets.content("owner/tiny@v3")


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
