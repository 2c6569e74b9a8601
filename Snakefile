# From a profile to a book: fetch the assets, score the questions, run the notebooks, join their results, build.
#
#   make book PROFILE=smoke      what most people type
#   make plan PROFILE=smoke      what would run, and why
#
# The same graph on a cluster (`.venv/bin/python -m pip install snakemake-executor-plugin-slurm` brings its executor):
#
#   .venv/bin/python -m snakemake --nolock --config profile=smoke --executor slurm --jobs 20 --max-threads 2
#
# A cluster that keeps no accounts needs `--slurm-no-account --slurm-status-command squeue` too. Fetching, joining and
# the book run where the command does; every other job asks for its threads, memory and wall time, which
# `--set-threads notebook=8` and `--set-resources notebook:mem_mb=16000 notebook:runtime=600` change. Where a profile
# has a device_map, a job of 04_llm_qa asks for a GPU. The log of such a run is in book/reproduce.md.
#
# A job runs again when what it depends on has changed in content: its notebook, the modules that the notebook
# can reach, its own section of the profile, its assets and models, the lock, or the rule itself.
#
# The resource `machine` is a percentage. The Makefile allows 100, so that a job that needs a machine for itself,
# because it fills it or measures time, runs alone there; on a cluster it has its own node or cores anyway.

import re
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from isouq.pipeline import graph

try:
    RUN = graph.Graph(config)
    dry = {"-n", "--dry-run", "--dryrun"} & {*sys.argv}  # workflow.dryrun is not set before this file is read
    if workflow.is_main_process and not dry:
        LOCK = graph.lock(RUN.build)  # until this process ends
except (ValueError, BlockingIOError) as error:
    raise WorkflowError(str(error)) from None

BUILD, CHAPTERS, PYTHON = RUN.build, RUN.chapters, sys.executable
TIMED = [*CHAPTERS, *RUN.shards, *(f"mcmc-{problem}" for problem in RUN.problems)]


wildcard_constraints:
    chapter="|".join(CHAPTERS),
    shard="|".join(map(re.escape, RUN.shards)),
    problem="|".join(RUN.problems),


localrules:
    book,
    fetch,
    collect,


rule book:
    default_target: True
    input:
        sources=[str(p) for p in Path("book").rglob("*") if p.is_file() and p.suffix != ".pyc"],
        config="_config.yml",
        citation="CITATION.cff",  # which the page on citing quotes
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
        *graph.pins(RUN.assets),
    message:
        "Fetching models and data"
    shell:
        f"{{PYTHON:q}} -m isouq.cli assets fetch {' '.join(RUN.assets)}" if RUN.assets else "true"


rule score:
    input:
        graph.modules("isouq/studies/qa/study.py"),
        "requirements.lock",
        fetched=ancient(f"{BUILD}/assets.fetched"),
    output:
        f"{BUILD}/qa/{{shard}}.done",
    params:
        **RUN.scoring(),
        model=lambda wildcards: RUN.shards[wildcards.shard][0],
        data_set=lambda wildcards: RUN.shards[wildcards.shard][1],
        content=lambda wildcards: RUN.contents([RUN.shards[wildcards.shard][0]]),
    threads: 8
    resources:
        mem_mb=RUN.memory_mb,
        runtime=RUN.minutes,
        gpu=RUN.gpus,
        machine=100,
    benchmark:
        f"{BUILD}/timings/{{shard}}.tsv"
    message:
        "Scoring {params.data_set} with {params.model}"
    shell:
        "{PYTHON:q} -m isouq.pipeline.jobs score --profile {RUN.argument:q} --model={params.model:q}"
        " --data-set {params.data_set:q} > {output:q}"


rule sample:
    input:
        graph.modules("isouq/studies/synthetic/plan.py"),
        "requirements.lock",
    output:
        f"{BUILD}/mcmc/mcmc-{{problem}}.done",
    params:
        *RUN.sampling(),
    threads: 1
    resources:
        mem_mb=3000,  # small networks: draws of at most 2 GB, and jax
        runtime=RUN.minutes,
        machine=1,
    benchmark:
        f"{BUILD}/timings/mcmc-{{problem}}.tsv"
    message:
        "Sampling posteriors of {wildcards.problem}"
    shell:
        "{PYTHON:q} -m isouq.pipeline.jobs sample --profile {RUN.argument:q} --problem {wildcards.problem}"
        " --workers 1 > {output:q}"


rule notebook:
    input:
        "notebooks/{chapter}.ipynb",
        "requirements.lock",
        lambda wildcards: graph.modules(f"notebooks/{wildcards.chapter}.ipynb"),
        lambda wildcards: RUN.before(wildcards.chapter),
        fetched=ancient(f"{BUILD}/assets.fetched"),
    output:
        notebook=f"{BUILD}/notebooks/{{chapter}}.ipynb",
        results=f"{BUILD}/results/{{chapter}}.json",
        record=f"{BUILD}/records/{{chapter}}.json",
    params:
        **RUN.parameters(),
        sha256=lambda wildcards: graph.pins(RUN.sections[wildcards.chapter].assets()),
        contents=lambda wildcards: RUN.contents(RUN.models[wildcards.chapter]) + RUN.questions(wildcards.chapter),
    threads: 8
    resources:
        mem_mb=RUN.memory_mb,
        runtime=RUN.minutes,
        gpu=lambda wildcards: RUN.gpus if wildcards.chapter == "04_llm_qa" else 0,
        machine=100,
    benchmark:
        f"{BUILD}/timings/{{chapter}}.tsv"
    message:
        "Running notebooks/{wildcards.chapter}.ipynb"
    shell:
        "{PYTHON:q} -m isouq.pipeline.jobs notebook {wildcards.chapter} --profile {RUN.argument:q}"


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
        "{PYTHON:q} -m isouq.pipeline.jobs collect --profile {RUN.profile.name} --out {output}"
        " --results {input.results} --records {input.records} --timings {input.timings}"
