"""Keep a run and quote it in the README: results/PROFILE/{results.json,overview.svg} and the README's two blocks.

    python book/readme.py build/embedded/results.json

No number of ours is typed into the README: what stands between its markers is written here, from the largest kept run
that has question answering; the posteriors are quoted from `published` if that is kept.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))

from isouq_book import figure, findings, provenance, results  # noqa: E402
from isouq_book.results import Results, format_interval, format_number  # noqa: E402

from isouq.studies import claims, plotting, verdicts  # noqa: E402
from isouq.studies.results import Result  # noqa: E402
from isouq.studies.synthetic import findings as atlas  # noqa: E402
from isouq.studies.synthetic import plots, problems  # noqa: E402

FIRST = ("C1", "C2", "C4", "C6", "C7")  # of which the first page, too, says what was found
BLOCKS = ("found", "measured")  # in the order of the page
MODELS = {"smollm2-135m-instruct": "SmolLM2-135M-Instruct", "gemma-3-270m": "Gemma 3 270M"}
DATA_SETS = {
    "truthfulqa": "TruthfulQA (written)",
    "truthfulqa_choose": "TruthfulQA (choice)",
    "wikidata": "Wikidata recall",
    "triviaqa": "TriviaQA",
}
EFFECTS = {
    "activation": "ReLU in place of tanh",
    "width": "32 units in place of 8",
    "prior": "a fixed prior in place of one scaled by fan-in",
    "design": "200 examples, or inputs without a gap",
    "mode": "θ* at a local mode in place of the trained network",
    "map": "θ* at the MAP in place of the trained network",
}
METHODS = {
    "p_true": "P(True)",
    "semantic_entropy": "semantic entropy",
    "naive_entropy": "naive entropy",
    "likelihood": "negative log-likelihood (the control)",
    "epistemic": "epistemic U_E",
    "aleatoric": "aleatoric U_A",
    "combined": "fitted pair of both",
    "combined_curved": "fitted pair with squares",
    "log_gradient": "log G, the variance of log p",
}


def found(folder: str) -> str:
    """The README's findings: five sentences chosen by verdicts on that run, and how many claims hold."""
    entries = results.load(ROOT / folder / "results.json").entries
    stated = claims.load(ROOT / "book" / "claims.yml")
    judged = verdicts.judge(stated, entries)
    chosen = findings.sentences(stated, judged, entries, only=FIRST)
    lines = [f"- {text} ({claim.id}: {_outcome(judged[claim.id])})" for claim, text in chosen]
    return "\n".join([*lines, "", findings.count(judged), *_gains(entries)])


def _outcome(verdict: verdicts.Verdict) -> str:
    return ", ".join(filter(None, [verdict.outcome, findings.share(verdict)]))


def _gains(entries: Mapping[str, Result]) -> list[str]:
    """Where the fitted pair knows more than the probability of the answer, of all models and sets."""
    counts = [entries.get(f"qa.gain.combined.{name}") for name in ("pairs", "above", "below")]
    if None in counts:
        return []
    pairs, above, below = (format_number(entry.value) for entry in counts if entry)
    return [
        f"Beside them: of {pairs} pairs of model and question set, the fitted pair of estimates tells wrong answers",
        f"better than the answer's plain probability in {above} and worse in {below}; in the others neither is shown",
        "(by single 95 % intervals, not corrected for their number).",
        *_fair(entries),
    ]


def _fair(entries: Mapping[str, Result]) -> list[str]:
    """What is left of the pair's advantage over P(True) where that is fitted, too."""
    written, choice = (f"qa.mean.{name}.combined.auroc_over_p_true_fitted" for name in list(DATA_SETS)[:2])
    if not {written, choice} <= entries.keys():
        return []
    return [
        "The pair is fitted and its rivals are not, as in the paper. Given a fit of their own, what the pair has over",
        f"P(True) is {format_interval(entries[written])} on TruthfulQA (written) and",
        f"{format_interval(entries[choice])} (choice).",
    ]


def measured(folder: str) -> str:
    """The README's numbers: the figure, the table behind it, what a score costs, and which run it was."""
    run = results.load(ROOT / folder / "results.json")
    largest = ROOT / "results" / "published" / "results.json"
    study = results.load(largest) if largest.is_file() and largest.parent != ROOT / folder else run
    entries = run.entries
    model = model_of(run)
    asked = {d: title for d, title in DATA_SETS.items() if f"qa.{model}.{d}.accuracy" in entries}
    lines = [
        f"![How well each score tells wrong answers of {MODELS[model]} from right ones]({folder}/overview.svg)",
        "",
        f"AUROC for “the answer is wrong” of {MODELS[model]} (4-bit checkpoint, in float32), high = wrong, with 95 %",
        "bootstrap intervals over questions. ½ is chance; below ½ a score points the wrong way.",
        "",
    ]
    accuracy = ["right answers (a share)", *(_cell(entries, f"qa.{model}.{d}.accuracy") for d in asked)]
    lines += _table(["", *asked.values()], [accuracy, *_aurocs(entries, model, asked)])
    lines += [*_committed(entries, model), *_mean(entries, asked), *_cost(entries), *_isotropy(entries)]
    posteriors = _posteriors(study)
    runs = [line for meta in (run.meta, *([study.meta] if posteriors else [])) for line in _runs(meta)]
    return "\n".join([*lines, *posteriors, *(f"- {line}" for line in dict.fromkeys(runs))])


def _table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a table, and an empty one behind it."""
    lines = [head, ["---"] * len(head), *rows]
    return [*(" ".join(f"| {cell}".strip() for cell in (*line, "")) for line in lines), ""]


def _aurocs(entries: Mapping[str, Result], model: str, asked: Iterable[str]) -> list[list[str]]:
    """A row of the table for each score that has a number."""
    rows = []
    for method, label in METHODS.items():
        keys = [f"qa.{model}.{d}.{method}.auroc" for d in asked]
        if any(key in entries for key in keys):
            rows.append([label, *(_cell(entries, key) for key in keys)])
    return rows


def _mean(entries: Mapping[str, Result], asked: Mapping[str, str]) -> list[str]:
    """The same over the models, where more than one was asked."""
    counts = {d: entries[key] for d in asked if (key := f"qa.mean.{d}.models.count") in entries}
    if not counts:
        return []
    return [
        f"Mean over {max(counts.values(), key=lambda entry: entry.value).note}:",
        "",
        *_table(["", *(asked[d] for d in counts)], _aurocs(entries, "mean", counts)),
    ]


def model_of(run: Results) -> str:
    """The model whose answers are quoted. Raises ValueError when the run has none."""
    model = next((name for name in MODELS if f"qa.{name}.wikidata.accuracy" in run.entries), None)
    if model is None:
        raise ValueError("results.json holds no question-answering results; run a profile with 04_llm_qa")
    return model


def _committed(entries: Mapping[str, Result], model: str) -> list[str]:
    """The scores on TruthfulQA with and without the answer that its official prompt shows."""
    names = [f"{method}{end}" for method in ("combined", "likelihood") for end in ("_committed", "")]
    keys = [f"qa.{model}.truthfulqa_choose.{name}.auroc" for name in names]
    if not all(key in entries for key in keys):
        return []
    both, both_all, control, control_all = (format_interval(entries[key]) for key in keys)
    return [
        "On TruthfulQA (choice) one answer, “I have no comment.”, stands in the official prompt and counts as true.",
        f"Without it the fitted pair has {both} (with it: {both_all}), the control {control} (with it: {control_all}).",
        "",
    ]


def _cell(entries: Mapping[str, Result], key: str) -> str:
    return format_interval(entries[key]) if key in entries else "too few of a class to say"


def _cost(entries: Mapping[str, Result]) -> list[str]:
    costs = []
    for model, label in MODELS.items():
        keys = [f"cost.{model}.ghost.relative_to_forward", f"cost.{model}.ghost.speedup_over_autograd"]
        if all(key in entries for key in keys):
            ratio, speedup = (format_number(entries[key].value, ".1f") for key in keys)
            costs.append(
                f"{label}: {ratio} × its plain forward pass, {speedup} × faster than a backward pass per example"
            )
    head = "Cost of the exact norm over all parameters, batches of 8 at 64 tokens: "
    why = "A plain pass computes logits at every token, the engine at those of the answer alone."
    return [head + "; ".join(costs) + ".", why, ""] if costs else []


def _isotropy(entries: Mapping[str, Result]) -> list[str]:
    """What a covariance from other data does (C2), whether ranks survive (C3), and isotropy's part of the error."""
    sources = {
        "control": "new data of the same distribution (control: has to be below 0)",
        "shifted": "data moved aside",
        "other_problem": "another problem's inputs",
        "noise": "noise",
    }
    keys = [f"isotropy.dose.w32.fisher.local.{source}" for source in sources]
    keys += [f"isotropy.ranks.{name}" for name in ("rho", "slope")] + ["isotropy.chain.mean.isotropy_share"]
    if not all(key in entries for key in keys):
        return []
    *cells, rho, slope, share = [format_interval(entries[key]) for key in keys]
    return [
        "A Fisher made from data instead of isotropy, on small networks with a known posterior: how much more of its",
        "error than of isotropy's nearness to those data explains (share of variance, 95 % intervals over n problems).",
        "",
        *_table(["Fisher made from", "structure, added"], zip(sources.values(), cells, strict=True)),
        "In the widest networks, rank correlation of Laplace's variance of the log odds with isotropy's:",
        f"{rho}; change of its z with each doubling of the width: {slope}.",
        f"Isotropy's share of the squared log error of ‖g‖²: {share}.",
        "",
    ]


def _posteriors(run: Results) -> list[str]:
    """When ‖g‖² follows the variance that MCMC finds: in which share of settings, and where it was declared (C4)."""
    if "mcmc.atlas.share" not in run.entries:
        return []
    stated = {claim.id: claim for claim in claims.load(ROOT / "book" / "claims.yml")}
    rows = []
    for check in stated["C4"].checks:
        if check.paper is not None:
            entry = run.entries.get(check.key)
            ours = "failed the gate" if entry is None else format_interval(entry)
            rows.append([check.label.removesuffix(", ρ"), ours, str(check.paper)])
    changes = {f"mcmc.atlas.effect.{name}": label for name, label in EFFECTS.items()}
    said = [f"- {label}: {format_interval(run.entries[key])}" for key, label in changes.items() if key in run.entries]
    folder = f"results/{run.meta['profile']}"
    return [
        f"![Rank correlation of ‖g‖² with the variance that MCMC finds, in every setting]({folder}/atlas.svg)",
        "",
        "On small networks with a known posterior, ‖g‖² comes within 0.1 of the paper's rank correlation with MCMC, or",
        f"above it, in this share of settings: {format_interval(run.entries['mcmc.atlas.share'])} (n problems).",
        "In the setting that was declared beforehand, with 95 % intervals over n data seeds:",
        "",
        *_table(["", "here", "the paper"], rows),
        "What changes the agreement (Fisher's z of ρ, mean over n problems):",
        "",
        *said,
        "",
    ]


def _runs(meta: Mapping[str, Any]) -> list[str]:
    """A line for each run that the numbers come from: its chapters, commit and day."""
    hardware = meta.get("hardware", {})
    machine = f", {hardware['cores']} cores" if "cores" in hardware else ""
    whole = {"every chapter": f"commit {meta['commit'][:10]}, made on {meta['created'][:10]}"}
    runs = provenance.chapters(meta) or whole
    return [f"Profile `{meta['profile']}`{machine}; {names}: {ran}." for names, ran in runs.items()]


def with_blocks(readme: str, folder: str) -> str:
    """The README's text with the blocks of a run between their markers. Raises ValueError when a marker is missing."""
    texts = (found(folder), measured(folder))
    for name, text in zip(BLOCKS, texts, strict=True):
        begin, end = f"<!-- {name}: written by book/readme.py -->", f"<!-- end of what was {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(readme):
            raise ValueError(f"README.md lacks the markers {begin} and {end}")
        block = f"{begin}\n{text}\n{end}"
        readme = pattern.sub(lambda _, block=block: block, readme)
    return readme


def quoted(readme: str) -> str:
    """The folder of the run that a README quotes. Raises ValueError when it quotes none."""
    shown = re.search(r"\((results/[\w-]+)/overview\.svg\)", readme)
    if not shown:
        raise ValueError("README.md shows no figure made from results")
    return shown[1]


def draw_overview(run: Results, target: Path) -> None:
    """The figure of the README: AUROC by data set and score. Raises ValueError when the run has none."""
    model = model_of(run)
    asked = {d: title for d, title in DATA_SETS.items() if f"qa.{model}.{d}.accuracy" in run.entries}
    methods = [m for m in METHODS if any(f"qa.{model}.{d}.{m}.auroc" in run.entries for d in asked)]
    patterns = [f"qa.{model}.{data_set}.{{method}}.auroc" for data_set in asked]
    panels = figure.read_panels(patterns, list(asked.values()), methods, run.entries)
    figure.draw(panels, methods, target, xlabel="AUROC", reference=0.5)


def draw_atlas(run: Results, target: Path) -> None:
    """The figure of all settings: ρ of ‖g‖², of Laplace and of the aleatoric estimate with MCMC."""
    pattern = re.compile(r"mcmc\.atlas\.(\w+)\.(\w+)\.w(\d+)\.(\w+)\.(\w+)\.(\w+)\.spearman")
    found = [(match, entry) for key, entry in run.entries.items() if (match := pattern.fullmatch(key))]
    columns = [*atlas.FACTORS, "method", "value"]
    table = pd.DataFrame([(*match.groups(), entry.value) for match, entry in found], columns=columns)
    table = table.astype({"width": int}).assign(headline=atlas.is_headline)
    table["paper"] = [atlas.paper_value(m, "spearman", p) for m, p in table[["method", "problem"]].to_numpy()]
    titles = {name: spec.title for name, spec in problems.SPECS.items()}
    plots.atlas(table, titles).savefig(target, bbox_inches="tight", metadata={"Date": None})


def main(path: str) -> None:
    """Keep the results, draw the overview where they have one, and rewrite the README's blocks."""
    run, readme = results.load(path), ROOT / "README.md"
    text, folder = readme.read_text(encoding="utf-8"), f"results/{run.meta['profile']}"
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    if (kept := ROOT / folder / "results.json") != Path(path).resolve():
        shutil.copyfile(path, kept)
    if any(key.startswith("qa.") for key in run.entries):
        draw_overview(run, ROOT / folder / "overview.svg")
    if "mcmc.atlas.share" in run.entries:
        plotting.use_style()
        draw_atlas(run, ROOT / folder / "atlas.svg")
    drawn = (f"results/{name}" for name in ("published", "embedded", run.meta["profile"]))
    source = next((kept for kept in drawn if (ROOT / kept / "overview.svg").is_file()), None) or quoted(text)
    readme.write_text(with_blocks(text, source), encoding="utf-8")
    print(f"{folder} and README.md: written")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python book/readme.py build/PROFILE/results.json")
    main(sys.argv[1])
