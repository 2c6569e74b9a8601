"""One job: a problem, a data seed and a network, and how its posterior is sampled; ``atlas`` runs it."""

from dataclasses import dataclass, field, replace
from typing import Any

from isouq.studies import require
from isouq.studies.identity import digest
from isouq.studies.synthetic import problems
from isouq.studies.synthetic.posterior import Settings
from isouq.studies.synthetic.problems import Problem


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to sample and how; fields left None take the values of the problem's ``spec``."""

    problem: str
    seed: int = 0
    width: int | None = None
    depth: int | None = None
    activation: str | None = None
    prior_scale: float | None = None
    prior_scaling: str | None = None
    n_examples: int | None = None
    gap: bool | None = None
    resolution: int | None = None
    n_starts: int = 16
    settings: Settings = field(default_factory=Settings)

    def make(self) -> Problem:
        """Make the problem. Raises ValueError for unknown or impossible settings, before anything is sampled."""
        require.count("n_starts", self.n_starts)
        model = problems.spec(self.problem).model
        network = replace(model.network, **self._given("width", "depth", "activation"))
        model = replace(model, network=network, **self._given("prior_scale", "prior_scaling"))
        data = {name: getattr(self, name) for name in ("seed", "n_examples", "resolution", "gap")}
        problem = problems.make(self.problem, model=model, **data)
        self.settings.require_memory(problem)
        return problem

    def _given(self, *names: str) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def file(self) -> str:
        """Return the name of the job's record: readable, and unique to the data, the model and the settings."""
        problem = self.make()
        network = problem.model.network
        key = digest([problem.fingerprint(), self.settings.identity(), self.n_starts])[:8]
        size = f"w{network.width}-d{network.depth}-{network.activation}-{problem.model.prior_scaling}"
        return f"{self.problem}-{size}-n{len(problem.inputs)}-s{self.seed}-{key}.json"
