"""What a study does to every question, stage by stage, into a store that keeps each question once it is done.

answer → verdict, estimate, token_mean, cheap and, in a choice, choice; sample → meaning, p_true. A stage reads records
of earlier ones and never edits them. What is stored costs hours, so code enters a store's identity as VERSION, raised
by hand where a stored number changes; tests/qa/test_golden_answers.py holds numbers that notice.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from isouq.estimate import Aggregation, Estimate
from isouq.gradients import Engine
from isouq.language import scoring
from isouq.language.examples import each, from_pairs
from isouq.studies.qa import rivals, sampling
from isouq.studies.qa.answers import answer, choice, verdict
from isouq.studies.qa.subject import Record, Settings, Subject
from isouq.studies.store import Store, identity_of

VERSION = 1
EXPORT_EVERY = 600.0  # seconds after which the records of a run in progress are written out again

Pair = tuple[Sequence[int], Sequence[int]]  # the ids of a prompt and of its answer


class LackingError(Exception):
    """A store lacks records that were not to be computed."""


def complete(
    store: Store, subject: Subject, settings: Settings, *, progress: bool | None = None, compute: bool = True
) -> None:
    """Compute every record that the store lacks. Raises LackingError instead where `compute` is False."""
    questions = {question.item_id: question for question in subject.questions}
    for item_id in store.missing("question", questions):
        if not compute:
            raise LackingError
        store.put(item_id, {"question": asdict(questions[item_id])})
    fill = _Batches(store, subject, settings, progress, compute).fill
    most = settings.max_new_tokens * (2 if subject.data_set.sentences else 1)
    rows, read = range(len(questions)), [len(prompt) for prompt in subject.prompts]
    fill("answer", rows, lambda batch: answer(subject, batch, most), read)
    answers = _by_row(store, subject, "answer")
    fill("verdict", rows, lambda batch: [verdict(subject, row, answers[row]) for row in batch], read)

    # Answers without text are wrong, and have no scores.
    ids = [answer["token_ids"] if answer.get("text") else [] for answer in answers]
    pairs = list(zip(subject.prompts, ids, strict=True))
    lengths = [len(prompt) + len(answer) if answer else 0 for prompt, answer in pairs]
    estimate = functools.partial(_estimate, subject.model, settings.engine)
    fill("estimate", pairs, lambda batch: estimate(batch, "sequence", "geometric"), lengths)
    # Its cost is the longest answer of a batch, so here answers of like length go together.
    n_tokens = [len(answer) if row < settings.n_token_mean else 0 for row, answer in enumerate(ids)]
    fill("token_mean", pairs, lambda batch: estimate(batch, "token_mean"), n_tokens)
    fill("cheap", pairs, lambda batch: rivals.answer_scores(subject.model, batch), lengths)
    if subject.choose:
        most_read = len(ids) if settings.n_choice is None else settings.n_choice
        read_so = [length if row < most_read else 0 for row, length in enumerate(lengths)]
        fill("choice", rows, lambda batch: [choice(subject, row, settings.engine) for row in batch], read_so)
    if not settings.n_samples:
        return

    # Samples of the solved examples of P(True) are kept under `shot`.
    asked = list(zip(subject.questions, subject.prompts, strict=True))
    how = {"n_samples": settings.n_samples, "max_new_tokens": most, "seed": settings.seed}
    for shot in subject.shots:
        if store.missing("shot", [shot[0].item_id]):
            if not compute:
                raise LackingError
            [samples] = sampling.sample(subject, [shot], **how)
            store.put(shot[0].item_id, {"shot": {**asdict(shot[0]), **samples}})
    fill("sample", asked, lambda batch: sampling.sample(subject, batch, **how), lengths)

    texts = [record.get("text", []) for record in _by_row(store, subject, "sample")]
    fill("meaning", rows, lambda batch: [sampling.meaning(subject, row, texts[row]) for row in batch], lengths)
    shots = store.get("shot")
    solved = sampling.solved_examples([(question, shots[question.item_id]["text"]) for question, _ in subject.shots])
    possible = list(zip(subject.questions, texts, (answer.get("text", "") for answer in answers), strict=True))
    fill("p_true", possible, lambda batch: sampling.p_true(subject, solved, batch), lengths)


def kept(path: Path, wanted: Record, records_dir: str | None) -> list[tuple[Path, Record]]:
    """Return the committed records of the run whose store is at `path`, each with its identity, the run's own first.

    Others were made with other versions of the libraries, or on a GPU: the same numbers but for the last digits of a
    float32, which now and then decide a token.
    """
    name = path.stem.rpartition("-")[0]
    files = sorted(Path(records_dir).glob(f"{name}-*.parquet")) if records_dir else []
    found = [(file, identity_of(file)) for file in files]
    return sorted([pair for pair in found if _asked(pair[1]) == _asked(wanted)], key=lambda pair: pair[1] != wanted)


def _asked(identity: Record) -> Record:
    """An identity without what a run was made with."""
    settings = {name: value for name, value in identity["settings"].items() if name != "device_map"}
    return identity | {"settings": settings, "versions": None}


def _by_row(store: Store, subject: Subject, stage: str) -> list[Record]:
    records = store.get(stage)
    return [records.get(question.item_id, {}) for question in subject.questions]


def _estimate(model: Any, engine: Engine, pairs: Sequence[Pair], *names: Aggregation) -> list[Record]:
    """An estimate for each aggregation, and under "layers" what `by_layer` says of "sequence"."""
    layers = "sequence" in names
    how = scoring.Scoring(aggregations=names, engine=engine, batch_size=len(pairs), breakdown=layers)
    found = scoring.score(model, from_pairs(pairs), how)
    records: list[Record] = [{name: _record(one, i) for name, one in found.items()} for i in range(len(pairs))]
    if layers:
        for record, shares in zip(records, by_layer(found["sequence"]), strict=True):
            record["layers"] = shares
    return records


def _record(estimate: Estimate, row: int) -> Record:
    names = ("log_prob", "n_tokens", "probability", "aleatoric", "log_epistemic")
    values = {name: getattr(estimate, name)[row].item() for name in names}
    return {**values, "engine": estimate.engine, "n_parameters": estimate.n_parameters}


def by_layer(estimate: Estimate) -> list[dict[str, float]]:
    """Return each example's `Estimate.by_layer` as "29.mlp" → log U_E, without a number outside blocks.

    A gradient that is exactly zero is −1e9.
    """
    table = estimate.by_layer()
    block = table["layer"].astype("string").add(".").fillna("")
    table = table.assign(group=block + table["kind"], log_epistemic=table["log_epistemic"].clip(lower=-1e9))
    return [dict(zip(rows["group"], rows["log_epistemic"], strict=True)) for _, rows in table.groupby("example")]


@dataclass(frozen=True)
class _Batches:
    """Fills a stage of the store: batches of similar length, longest first, one transaction a question.

    A question at which a stage fails (a prompt beyond the model's context) has the reason under `failed`, and no later
    stage of this run tries it; the others go on. The next run tries it again.
    """

    store: Store
    subject: Subject
    settings: Settings
    progress: bool | None
    compute: bool
    failed: set[str] = field(default_factory=set)

    def fill(
        self, stage: str, items: Sequence[Any], work: Callable[[list[Any]], list[Record]], lengths: Sequence[int]
    ) -> None:
        """Call `work` on the `items` of questions that lack a record of `stage`; those of length 0 are left out."""
        item_ids = [question.item_id for question in self.subject.questions]
        missing = set(self.store.missing(stage, item_ids)) - self.failed
        rows = [row for row, item_id in enumerate(item_ids) if lengths[row] and item_id in missing]
        if rows and not self.compute:
            raise LackingError
        rows.sort(key=lambda row: -lengths[row])
        n_all, size = sum(map(bool, lengths)), self.settings.batch_size
        hide = True if not n_all else None if self.progress is None else not self.progress
        exported = time.monotonic()
        with tqdm(total=n_all, initial=n_all - len(rows), desc=stage, unit="question", disable=hide) as bar:
            for batch in (rows[i : i + size] for i in range(0, len(rows), size)):
                start = time.perf_counter()
                reasons: dict[int, str] = {}
                records = each(work, {row: items[row] for row in batch}, reasons)
                seconds = (time.perf_counter() - start) / len(batch)
                for row, record in records.items():
                    self.store.put(item_ids[row], {stage: {**record, "seconds": seconds}})
                for row, reason in reasons.items():
                    self.store.put(item_ids[row], {"failed": {"stage": stage, "reason": reason}}, replace=True)
                    self.failed.add(item_ids[row])
                bar.update(len(batch))
                folder = self.settings.records_dir
                if folder and (batch[-1] == rows[-1] or time.monotonic() - exported > EXPORT_EVERY):
                    self.store.export(Path(folder, f"{self.store.path.stem}.parquet"))
                    exported = time.monotonic()
