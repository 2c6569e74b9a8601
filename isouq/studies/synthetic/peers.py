"""BlackJAX's NUTS on the same density, for a comparison of speed (extra `peers`)."""

import time
from collections.abc import Callable

import blackjax
import jax
import jax.numpy as jnp
import numpy as np

from isouq.studies.synthetic.posterior import Settings
from isouq.studies.synthetic.problems import Problem, float64


@float64
def blackjax_nuts(problem: Problem, settings: Settings) -> tuple[np.ndarray, float]:
    """Return draws (chain, draw, param) of θ and the seconds taken, warm-up included, compilation not.

    Window adaptation of step size and diagonal mass matrix, as many chains, warm-up steps and draws as
    `settings` say, the same start (a draw of the prior for each chain) and scaling.
    """
    scales = problem.model.scales()

    def log_density(z):
        return -problem.model.energy(scales * z, problem.inputs, problem.targets)

    chain = _chain(log_density, settings)
    run = jax.jit(lambda keys, starts: jax.lax.map(lambda one: chain(*one), (keys, starts)))  # as ours are run
    keys = jax.random.split(jax.random.key(settings.seed), (2, settings.n_chains))
    starts = jax.vmap(lambda key: jax.random.normal(key, scales.shape))(keys[0])
    compiled = run.lower(keys[1], starts).compile()
    begun = time.perf_counter()
    draws = np.asarray(compiled(keys[1], starts))
    return draws * scales, time.perf_counter() - begun


def _chain(log_density: Callable, settings: Settings) -> Callable:
    def run(key: jax.Array, start: jnp.ndarray) -> jnp.ndarray:
        warm_key, key = jax.random.split(key)
        adapt = blackjax.window_adaptation(blackjax.nuts, log_density, target_acceptance_rate=settings.target_accept)
        (state, parameters), _ = adapt.run(warm_key, start, num_steps=settings.n_warmup)
        step = blackjax.nuts(log_density, **parameters).step

        def draw(state, key):
            state, _ = step(key, state)
            return state, state.position

        return jax.lax.scan(draw, state, jax.random.split(key, settings.n_draws))[1]

    return run
