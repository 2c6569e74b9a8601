# From a profile to a book: fetch the assets, score the questions, run the notebooks, join their results, build.
#
#   make book PROFILE=smoke      what most people type
#   make plan PROFILE=smoke      what would run, and why
#
# The same graph on a cluster (`.venv/bin/python -m pip install snakemake-executor-plugin-slurm` brings its executor):
#
#   .venv/bin/python -m snakemake --nolock --config profile=smoke --executor slurm --jobs 20
#
# A cluster that keeps no accounts needs `--slurm-no-account --slurm-status-command squeue` too. Fetching, joining and
# the book run where the command does; every other job asks for its threads, memory and wall time, which
# `--set-threads notebook=8` and `--set-resources notebook:mem_mb=16000 notebook:runtime=600` change.
#
# A job runs again when what it depends on has changed in content: its notebook, the modules that the notebook
# can reach, its own section of the profile, its assets and models, the lock, or the rule itself.

import ast
import fcntl
import json
import math
import os
import re
import sys
import textwrap
from pathlib import Path

from snakemake.exceptions import WorkflowError
from snakemake.logging import logger
from snakemake_interface_logger_plugins.common import LogEvent

from isouq.pipeline import profiles
from isouq.models import ModelError
from isouq.studies import assets, identity, results

for word in config.keys() - {"profile"}:
    raise WorkflowError(f"--config {word}: not a known name; wanted profile, as in --config profile=smoke")
PROFILE_ARGUMENT = config.get("profile", "embedded")
if not isinstance(PROFILE_ARGUMENT, str):  # Snakemake makes a number of what looks like one
    raise WorkflowError(
        f"profile: Snakemake reads {PROFILE_ARGUMENT!r}, which is no name; name the file, as in profile=profiles/2024_10.yml"
    )
try:
    PROFILE = profiles.load(PROFILE_ARGUMENT)
    SECTIONS = {name: PROFILE.parameters(name) for name in PROFILE.chapters()}
    MODELS = {name: getattr(section, "models", []) for name, section in SECTIONS.items()}
    CONTENT = {model: assets.content(model) for model in sorted({*sum(MODELS.values(), [])})}
except (profiles.ProfileError, ModelError) as error:
    raise WorkflowError(str(error)) from None

BUILD = f"build/{PROFILE.name}"
CHAPTERS = [name for name in PROFILE.chapters() if Path(f"notebooks/{name}.ipynb").is_file()]
if not CHAPTERS:
    raise WorkflowError(f"profile {PROFILE.name!r} names no notebook of notebooks/")
SECTIONS = {name: PROFILE.parameters(name, results_path=f"{BUILD}/results/{name}.json") for name in CHAPTERS}
SHA256 = {asset.name: [member.sha256 for member in asset.members] for asset in assets.list_assets()}
PYTHON = sys.executable
# What one job may take on a cluster: as much as the profile states for a whole run, and twice the time, since machines
# differ. Posteriors are small networks: draws of at most 2 GB, and jax.
MEMORY, SMALL, MINUTES = math.ceil(1000 * PROFILE.memory_gb), 3000, math.ceil(2 * PROFILE.minutes)

CHATTER = re.compile(
    "\\s*(Assuming unrestricted|Building DAG|Using shell|Select jobs|Execute \\d+ jobs|Touching output|Reasons:|Complete log"
    "|Elapsed time|Shutting down|Exiting because|WorkflowError:\\s*At least one|RuleException:.*(-m isouq|book/build))",
    re.DOTALL,
)


def readable(record):
    """Cut what Snakemake says to a line a job, with the reason; what fails has told its own cause."""
    event, fields = getattr(record, "event", None), record.__dict__
    if event == LogEvent.JOB_INFO and fields["rule_msg"]:
        reason = re.sub("Missing output files: .*", "not made yet", fields["reason"] or "")
        reason = re.sub(".*before: (.*) now: (.*) ", changed, reason)
        record.event, record.msg = None, f"{fields['rule_msg']} ({textwrap.shorten(reason, 240, placeholder=' ...')})"
    if event == LogEvent.JOB_ERROR and fields["rule_name"] in ("book", "fetch", "notebook"):
        return False
    return not CHATTER.match(str(record.msg))


def changed(match):
    """The parameters that differ between two lists of JSON objects, as `n_questions: 60 -> 20`."""
    try:
        old, new = ([json.loads(part) for part in ast.literal_eval(f"[{text}]")] for text in match.groups())
        old, new = ({name: value for part in parts for name, value in part.items()} for parts in (old, new))
    except (ValueError, SyntaxError, TypeError, AttributeError):
        return "changed parameters"
    names = [name for name in old | new if old.get(name) != new.get(name)]
    return "changed " + ", ".join(f"{name}: {old.get(name)} -> {new.get(name)}" for name in sorted(names))


def heavy(wildcards):
    """Threads of a job that fills a machine: all there are, so that there is one at a time; on a cluster 2, as measured."""
    return workflow.resource_settings.cores or 2 if workflow.local_exec else 2


def contents(models):
    """What each model stands for now, as JSON: another commit or other bytes are another parameter."""
    return json.dumps({model: CONTENT[model] for model in models})


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
    return [os.path.relpath(file) for file in identity.module_files(path)]


def shards():
    """Job name -> (model, data set): what 04_llm_qa has scored before it starts."""
    section = SECTIONS.get("04_llm_qa")
    pairs = [(model, data_set) for model in section.models for data_set in section.data_sets] if section else []
    return {f"qa-{results.key_of(model)}-{data_set}": (model, data_set) for model, data_set in pairs}


SHARDS = shards()
POSTERIORS = {f"mcmc-{name}": name for name in SECTIONS["03_mcmc"].problems()} if "03_mcmc" in SECTIONS else {}
ISOTROPY = SECTIONS["02_isotropy"].problem_names if "02_isotropy" in SECTIONS else []
BEFORE = {  # what has to be done before a notebook starts
    "02_isotropy": [f"{BUILD}/mcmc/{shard}.done" for shard, name in POSTERIORS.items() if name in ISOTROPY],
    "03_mcmc": [f"{BUILD}/mcmc/{shard}.done" for shard in POSTERIORS],
    "04_llm_qa": [f"{BUILD}/qa/{shard}.done" for shard in SHARDS],
}
NEEDED = sorted({name for section in SECTIONS.values() for name in section.assets()})
TIMED = CHAPTERS + list(SHARDS) + list(POSTERIORS)


wildcard_constraints:
    chapter="|".join(CHAPTERS),


localrules:
    book,
    fetch,
    collect,


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
    shell:
        "{PYTHON:q} book/build.py {output} --results {input.results} --notebooks {input.notebooks}"


rule fetch:
    output:
        touch(f"{BUILD}/assets.fetched"),
    params:
        sha256=json.dumps({name: SHA256[name] for name in NEEDED}),
    message:
        "Fetching models and data"
    shell:
        f"{{PYTHON:q}} -m isouq.cli assets fetch {' '.join(NEEDED)}" if NEEDED else "true"


if SHARDS:

    rule score:
        input:
            modules("isouq/studies/qa/study.py"),
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
            content=lambda wildcards: contents([SHARDS[wildcards.shard][0]]),
        threads: heavy
        resources:
            mem_mb=MEMORY,
            runtime=MINUTES,
        benchmark:
            f"{BUILD}/timings/{{shard}}.tsv"
        message:
            "Scoring {params.data_set} with {params.model}"
        shell:
            "{PYTHON:q} -m isouq.pipeline.jobs score --profile {PROFILE_ARGUMENT:q} --model={params.model:q}"
            " --data-set {params.data_set:q} --done {output:q}"


if POSTERIORS:

    rule sample:
        input:
            modules("isouq/studies/synthetic/plan.py"),
            "requirements.lock",
        output:
            f"{BUILD}/mcmc/{{shard}}.done",
        wildcard_constraints:
            shard="|".join(map(re.escape, POSTERIORS)),
        params:
            problem=lambda wildcards: POSTERIORS[wildcards.shard],
            settings=json.dumps(SECTIONS["03_mcmc"].model_dump()),
        threads: 1
        resources:
            mem_mb=SMALL,
            runtime=MINUTES,
        benchmark:
            f"{BUILD}/timings/{{shard}}.tsv"
        message:
            "Sampling posteriors of {params.problem}"
        shell:
            "{PYTHON:q} -m isouq.pipeline.jobs sample --profile {PROFILE_ARGUMENT:q} --problem {params.problem}"
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
        sha256=lambda wildcards: json.dumps({name: SHA256[name] for name in SECTIONS[wildcards.chapter].assets()}),
        models=lambda wildcards: contents(MODELS[wildcards.chapter]),
    threads: heavy
    resources:
        mem_mb=MEMORY,
        runtime=MINUTES,
    benchmark:
        f"{BUILD}/timings/{{chapter}}.tsv"
    message:
        "Running notebooks/{wildcards.chapter}.ipynb"
    shell:
        "{PYTHON:q} -m isouq.pipeline.runner run {input.source} {output.notebook} --parameters {params.parameters:q}"
        " --models {params.models:q} --record {output.record} --failed {BUILD}/failed"


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
        "{PYTHON:q} -m isouq.pipeline.runner collect {input.results} --out {output} --profile {PROFILE.name}"
        " --records {input.records} --timings {input.timings}"
