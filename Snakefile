# From a profile to a book: fetch the assets, score the questions, run the notebooks, join their results, build.
#
#   make book PROFILE=smoke      what most people type
#   make plan PROFILE=smoke      what would run, and why
#   snakemake --config profile=smoke --executor slurm --jobs 20     the same graph on a cluster (with its plugin)
#
# A job runs again when what it depends on has changed in content: its notebook, the modules that the notebook
# can reach, its own section of the profile, the checksums of its assets, the lock, or the rule itself.

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import yaml
from snakemake.exceptions import WorkflowError
from snakemake.logging import logger
from snakemake_interface_logger_plugins.common import LogEvent

from isouq import assets, profiles, provenance

PROFILE_ARGUMENT = str(config.get("profile", "embedded"))
try:
    PROFILE = profiles.load(PROFILE_ARGUMENT)
except profiles.ProfileError as error:
    raise WorkflowError(str(error)) from None

BUILD = f"build/{PROFILE.name}"
CHAPTERS = [name for name in PROFILE.chapters() if Path(f"notebooks/{name}.ipynb").is_file()]
if not CHAPTERS:
    raise WorkflowError(f"profile {PROFILE.name!r} names no notebook of notebooks/")
SECTIONS = {name: PROFILE.parameters(name, results_path=f"{BUILD}/results/{name}.json") for name in CHAPTERS}
SHA256 = {asset.name: [member.sha256 for member in asset.members] for asset in assets.list_assets()}
ALONE = workflow.cores or 2  # one heavy job at a time on one machine, so that memory is what the profile says
PYTHON = sys.executable

CHATTER = re.compile(
    "\\s*(Assuming unrestricted|Building DAG|Using shell|Select jobs|Execute \\d+ jobs|Touching output|Reasons:|Complete log"
    "|Elapsed time|Shutting down|Exiting because|WorkflowError:\\s*At least one|RuleException:.*isouq.provenance run)",
    re.DOTALL,
)


def readable(record):
    """Cut what Snakemake says to a line a job, with the reason; a notebook's failure has told its own cause."""
    event, fields = getattr(record, "event", None), record.__dict__
    if event == LogEvent.JOB_INFO and fields["rule_msg"]:
        reason = re.sub("Missing output files: .*", "not made yet", fields["reason"] or "")
        reason = re.sub(".*before: '(.*)' now: '(.*)' ", changed, reason)
        record.event, record.msg = None, f"{fields['rule_msg']} ({textwrap.shorten(reason, 240, placeholder=' ...')})"
    if event == LogEvent.JOB_ERROR and fields["rule_name"] == "notebook":
        return False
    return not CHATTER.match(str(record.msg))


def changed(match):
    """The parameters that differ between two JSON objects, as `n_questions: 60 -> 20`."""
    old, new = map(json.loads, match.groups())
    names = [name for name in old | new if old.get(name) != new.get(name)]
    return "changed " + ", ".join(f"{name}: {old.get(name)} -> {new.get(name)}" for name in names)


logger.addFilter(readable)

if workflow.is_main_process:
    # Held as long as this process lives: after a kill nothing is left to unlock, unlike with Snakemake's own.
    Path(BUILD).mkdir(parents=True, exist_ok=True)
    LOCK = open(f"{BUILD}/.lock", "w")
    try:
        fcntl.flock(LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise WorkflowError(f"another process is building {BUILD}: wait for it, or end it") from None


def modules(path):
    """The module files that a notebook or a module can reach, relative to the project."""
    return [os.path.relpath(file) for file in provenance.module_files(path)]


def shards():
    """Job name -> (model, data set): what 04_llm_qa has scored before it starts."""
    section = SECTIONS.get("04_llm_qa")
    pairs = [(model, data_set) for model in section.models for data_set in section.data_sets] if section else []
    return {re.sub(r"[^A-Za-z0-9.-]+", "_", f"qa-{model}-{data_set}"): (model, data_set) for model, data_set in pairs}


SHARDS = shards()
POSTERIORS = {f"mcmc-{name}": name for name in SECTIONS["03_mcmc"].problems()} if "03_mcmc" in SECTIONS else {}
ISOTROPY = SECTIONS["02_isotropy"].problem_names if "02_isotropy" in SECTIONS else []
BEFORE = {  # what has to be done before a notebook starts
    "02_isotropy": [f"{BUILD}/mcmc/{shard}.done" for shard, name in POSTERIORS.items() if name in ISOTROPY],
    "03_mcmc": [f"{BUILD}/mcmc/{shard}.done" for shard in POSTERIORS],
    "04_llm_qa": [f"{BUILD}/qa/{shard}.done" for shard in SHARDS],
}
TIMED = CHAPTERS + list(SHARDS) + list(POSTERIORS)


wildcard_constraints:
    chapter="|".join(CHAPTERS),


rule book:
    default_target: True
    input:
        sources=[str(p) for p in Path("book").rglob("*") if p.is_file() and p.suffix != ".pyc"],
        config="_config.yml",
        modules=sorted(str(p) for p in Path("isouq").rglob("*.py")),  # the page of functions shows their docstrings
        notebooks=expand(f"{BUILD}/notebooks/{{chapter}}.ipynb", chapter=CHAPTERS),
        results=f"{BUILD}/results.json",
    output:
        directory(f"{BUILD}/html"),
    message:
        "Building the book"
    run:
        build_book(input.notebooks, input.results, Path(output[0]))


rule fetch:
    output:
        touch(f"{BUILD}/assets.fetched"),
    params:
        sha256={name: SHA256[name] for section in SECTIONS.values() for name in section.assets()},
    message:
        "Fetching models and data"
    run:
        assets.fetch(sorted(params.sha256))


if SHARDS:

    rule score:
        input:
            modules("isouq/qa/study.py"),
            "requirements.lock",
            fetched=ancient(f"{BUILD}/assets.fetched"),
        output:
            f"{BUILD}/qa/{{shard}}.done",
        wildcard_constraints:
            shard="|".join(map(re.escape, SHARDS)),
        params:
            model=lambda wildcards: SHARDS[wildcards.shard][0],
            data_set=lambda wildcards: SHARDS[wildcards.shard][1],
            settings=json.dumps(SECTIONS["04_llm_qa"].scoring()),
        threads: ALONE
        benchmark:
            f"{BUILD}/timings/{{shard}}.tsv"
        message:
            "Scoring {params.data_set} with {params.model}"
        shell:
            "{PYTHON} -m isouq.qa.study --profile {PROFILE_ARGUMENT:q} --model {params.model:q}"
            " --data-set {params.data_set:q} --done {output:q}"


if POSTERIORS:

    rule sample:
        input:
            modules("isouq/synthetic/plan.py"),
            "requirements.lock",
        output:
            f"{BUILD}/mcmc/{{shard}}.done",
        wildcard_constraints:
            shard="|".join(map(re.escape, POSTERIORS)),
        params:
            problem=lambda wildcards: POSTERIORS[wildcards.shard],
            settings=json.dumps(SECTIONS["03_mcmc"].model_dump()),
        threads: 1
        benchmark:
            f"{BUILD}/timings/{{shard}}.tsv"
        message:
            "Sampling posteriors of {params.problem}"
        shell:
            "{PYTHON} -m isouq.synthetic.plan --profile {PROFILE_ARGUMENT:q} --problem {params.problem}"
            " --workers 1 --done {output:q}"


rule notebook:
    input:
        lambda wildcards: modules(f"notebooks/{wildcards.chapter}.ipynb"),
        "requirements.lock",
        lambda wildcards: BEFORE.get(wildcards.chapter, []),
        source="notebooks/{chapter}.ipynb",
        fetched=ancient(f"{BUILD}/assets.fetched"),
    output:
        notebook=f"{BUILD}/notebooks/{{chapter}}.ipynb",
        results=f"{BUILD}/results/{{chapter}}.json",
        record=f"{BUILD}/records/{{chapter}}.json",
    params:
        parameters=lambda wildcards: json.dumps(SECTIONS[wildcards.chapter].model_dump()),
        sha256=lambda wildcards: {name: SHA256[name] for name in SECTIONS[wildcards.chapter].assets()},
    threads: ALONE
    benchmark:
        f"{BUILD}/timings/{{chapter}}.tsv"
    message:
        "Running notebooks/{wildcards.chapter}.ipynb"
    shell:
        "{PYTHON} -m isouq.provenance run {input.source} {output.notebook} --parameters {params.parameters:q}"
        " --record {output.record} --failed {BUILD}/failed"


rule collect:
    input:
        results=expand(f"{BUILD}/results/{{chapter}}.json", chapter=CHAPTERS),
        records=expand(f"{BUILD}/records/{{chapter}}.json", chapter=CHAPTERS),
        timings=expand(f"{BUILD}/timings/{{job}}.tsv", job=TIMED),
    output:
        f"{BUILD}/results.json",
    message:
        "Joining results"
    shell:
        "{PYTHON} -m isouq.provenance collect {input.results} --out {output} --profile {PROFILE.name}"
        " --records {input.records} --timings {input.timings}"


def build_book(notebooks, results, html):
    """Lay the pages and the executed notebooks into one folder, and have Jupyter Book read it, without a warning."""
    source, log = Path(f"{BUILD}/book"), Path(f"{BUILD}/book.log")
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree("book", source, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "notebooks").mkdir(exist_ok=True)
    for notebook in notebooks:
        shutil.copy(notebook, source / "notebooks")
    toc = source / "_toc.yml"
    toc.write_text(yaml.safe_dump(without_absent(yaml.safe_load(toc.read_text())), sort_keys=False))
    command = [PYTHON, "-c", "from jupyter_book.cli.main import main; main()", "build", str(source), "--config", "_config.yml"]
    command += ["--toc", str(toc.resolve()), "--path-output", str(source), "-n", "-W", "--keep-going"]
    with log.open("w") as stream:
        environment = os.environ | {"ISOUQ_RESULTS": str(Path(results).resolve()), "NO_COLOR": "1"}
        run = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
    if run.returncode:
        lines = provenance.ANSI.sub("", log.read_text()).splitlines()
        wrong = [line for line in lines if re.search("warning:|error:|exception", line, re.I)] or lines[-30:]
        raise WorkflowError("\n".join([*wrong, f"The book has warnings or errors, above; the whole log is {log}"]))
    shutil.rmtree(html, ignore_errors=True)
    shutil.move(source / "_build" / "html", html)


def without_absent(entry):
    """The table of contents without the chapters that this profile does not run."""
    if isinstance(entry, list):
        return [kept for kept in map(without_absent, entry) if kept is not None]
    if isinstance(entry, dict):
        chapter = re.match("notebooks/(.*)", str(entry.get("file", "")))
        if chapter and chapter[1] not in CHAPTERS:
            return None
        return {key: without_absent(value) for key, value in entry.items()}
    return entry
