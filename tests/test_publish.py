"""What makes the project citable and published: its address, workflows, container file and codecheck.yml."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import address  # noqa: E402

URL = "https://github.com/ada/isouq"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    for name in address.FILES:
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setattr(address, "ROOT", tmp_path)
    return tmp_path


def test_an_address_is_written_into_every_file_and_can_be_another(clone):
    before = {name: (clone / name).read_text() for name in address.FILES}
    address.main("https://example.org/b/c.d")
    address.main(URL)
    texts = {name: (clone / name).read_text() for name in address.FILES}
    assert tomllib.loads(texts["pyproject.toml"])["project"]["urls"]["Issues"] == f"{URL}/issues"
    assert yaml.safe_load(texts["CITATION.cff"])["repository-code"] == URL
    config = yaml.safe_load(texts["_config.yml"])
    assert config["repository"] == {"path_to_book": "", "branch": "main", "url": URL}
    assert config["html"]["use_issues_button"] is True
    assert set(config["launch_buttons"]) == {"colab_url", "binderhub_url"}
    assert not [text for text in texts.values() if "OWNER" in text or "example.org" in text]
    for name in address.FILES:
        changed = [line for line in texts[name].split("\n") if line not in before[name].split("\n")]
        assert all(line.endswith(address.MARK) for line in changed)


WRONG = ["github.com/a/b", "https://github.com/a", f"{URL}.git", f"{URL}/", "https://x.org/a b/c"]


@pytest.mark.parametrize("url", WRONG)
def test_what_is_no_address_is_refused_and_changes_nothing(clone, url):
    before = [(clone / name).read_bytes() for name in address.FILES]
    with pytest.raises(ValueError, match="wanted https://HOST/OWNER/NAME"):
        address.main(url)
    assert [(clone / name).read_bytes() for name in address.FILES] == before


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
class TestWorkflow:
    def test_asks_only_for_commands_that_there_are(self, path):
        jobs = yaml.safe_load(path.read_text())["jobs"]
        commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
        assert commands
        for command in commands:
            words = command.split()
            assert words[0] == "make"
            assert words[1] in TARGETS, command

    def test_pins_every_action_has_a_limit_and_gives_away_no_right(self, path):
        content = yaml.safe_load(path.read_text())
        uses = re.findall(r"uses: (.*)", path.read_text())
        assert uses
        assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v[\d.]+", one) for one in uses)
        assert content["permissions"]["contents"] == "read"
        assert all("timeout-minutes" in job for job in content["jobs"].values())


def test_the_workflows_pin_an_action_alike_and_cover_what_we_support():
    texts = {path.stem: path.read_text() for path in WORKFLOWS}
    pins = set(re.findall(r"uses: ([\w/-]+)@(\w+)", "".join(texts.values())))
    assert len(pins) == len({name for name, _ in pins})
    matrix = yaml.safe_load(texts["tests"])["jobs"]["quick"]["strategy"]["matrix"]
    assert matrix["python"] == ["3.11", "3.12", "3.13"]
    assert {system.split("-")[0] for system in matrix["system"]} == {"ubuntu", "macos"}
    assert "id-token: write" in texts["release"]
    assert "password" not in texts["release"].replace("no password", "")


def test_the_container_file_runs_commands_of_the_makefile():
    text = (ROOT / "Dockerfile").read_text()
    assert 'CMD ["make", "book", "PROFILE=smoke"]' in text
    assert f"READY := {re.search('RUN make ([^ ]+)', text)[1]}\n" in (ROOT / "Makefile").read_text()
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".venv", "build"} <= set(ignored)


def test_codecheck_lists_what_is_kept_and_names_the_paper():
    text = (ROOT / "codecheck.yml").read_text()
    content, citation = yaml.safe_load(text), yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"][0]
    assert text.startswith("---\n")
    assert content["version"] == "https://codecheck.org.uk/spec/config/2.0/"
    paper = content["paper"]
    assert (paper["title"], paper["reference"]) == (citation["title"], citation["url"])
    names = [f"{one['given-names']} {one['family-names']}" for one in citation["authors"]]
    assert [author["name"] for author in paper["authors"]] == names
    files = [entry["file"] for entry in content["manifest"]]
    assert all(entry["comment"].strip() for entry in content["manifest"])
    assert [file for file in files if not (ROOT / file).is_file()] == []
    kept = {p.relative_to(ROOT).as_posix() for p in (ROOT / "results" / "published" / "notebooks").glob("*.ipynb")}
    assert kept <= set(files), "every executed notebook of results/published has its line in codecheck.yml"
    commands = re.findall(r"`make ([a-z-]+)", text)
    assert commands
    assert set(commands) <= set(TARGETS)


def test_the_package_snippet_is_the_first_of_the_readme():
    recipe = re.search(r"(sed -n '/\^```python/.*README\.md \| sed .*?) >", (ROOT / "Makefile").read_text())[1]
    ran = subprocess.run(["sh", "-c", recipe.replace("$$", "$")], cwd=ROOT, capture_output=True, text=True, check=True)
    first = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)[1]
    assert ran.stdout == first
