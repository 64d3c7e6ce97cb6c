"""Reasoning strategies: each is one file with an options model and a short async function ``run``."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from braid.errors import BadRequest
from router.strategies import (
    adaptive_consistency,
    auto,
    beam_of_steps,
    beam_search,
    best_of_n,
    car,
    cascade,
    certaindex,
    cot,
    cot_decoding,
    deepconf,
    direct,
    early_stopping_consistency,
    ensemble,
    first_finish,
    genrm,
    mbr,
    mixture_of_agents,
    particle_filtering,
    plugins,
    rejection_sampling,
    retrieval,
    rollouts,
    self_consistency,
    self_refine,
    tools,
    tree_of_thoughts,
    universal_consistency,
)
from router.strategies.options import Options
from router.strategies.spec import StrategySpec


def _built_in(module: ModuleType, options: type[Options]) -> StrategySpec:
    """A strategy is named as its file, and told by the first line of its docstring."""
    name = module.__name__.rpartition(".")[2]
    return StrategySpec(name, options, module.run, (module.__doc__ or "").partition("\n")[0])


_SPECS = {
    spec.name: spec
    for spec in (
        _built_in(direct, direct.DirectOptions),
        _built_in(cot, cot.CotOptions),
        _built_in(self_consistency, self_consistency.SelfConsistencyOptions),
        _built_in(best_of_n, best_of_n.BestOfNOptions),
        _built_in(adaptive_consistency, adaptive_consistency.AdaptiveConsistencyOptions),
        _built_in(early_stopping_consistency, early_stopping_consistency.EarlyStoppingConsistencyOptions),
        _built_in(universal_consistency, universal_consistency.UniversalConsistencyOptions),
        _built_in(mbr, mbr.MbrOptions),
        _built_in(rejection_sampling, rejection_sampling.RejectionSamplingOptions),
        _built_in(rollouts, rollouts.RolloutsOptions),
        _built_in(car, car.CarOptions),
        _built_in(first_finish, first_finish.FirstFinishOptions),
        _built_in(self_refine, self_refine.SelfRefineOptions),
        _built_in(mixture_of_agents, mixture_of_agents.MixtureOfAgentsOptions),
        _built_in(genrm, genrm.GenrmOptions),
        _built_in(tools, tools.ToolsOptions),
        _built_in(retrieval, retrieval.RetrievalOptions),
        _built_in(beam_search, beam_search.BeamSearchOptions),
        _built_in(deepconf, deepconf.DeepconfOptions),
        _built_in(cot_decoding, cot_decoding.CotDecodingOptions),
        _built_in(certaindex, certaindex.CertaindexOptions),
        _built_in(beam_of_steps, beam_of_steps.BeamOfStepsOptions),
        _built_in(particle_filtering, particle_filtering.ParticleFilteringOptions),
        _built_in(tree_of_thoughts, tree_of_thoughts.TreeOfThoughtsOptions),
        _built_in(ensemble, ensemble.EnsembleOptions),
        _built_in(cascade, cascade.CascadeOptions),
        _built_in(auto, auto.AutoOptions),
    )
}
_OWN = frozenset(_SPECS)


def names() -> tuple[str, ...]:
    """The strategies a request may name."""
    return tuple(_SPECS)


def get(name: str) -> StrategySpec:
    """The strategy called ``name``.

    Raises:
        BadRequest: there is none.
    """
    spec = _SPECS.get(name) if isinstance(name, str) else None
    if spec is None:
        raise BadRequest(
            f"no such strategy; there are {', '.join(_SPECS)}", param="reasoning.strategy", code="strategy"
        )
    return spec


def describe(**defaults: Any) -> list[dict[str, Any]]:
    """Every strategy as in ``GET /v1/strategies``; ``defaults`` are the router's, by option."""
    return [spec.describe(**defaults) for spec in _SPECS.values()]


def load_plugins() -> None:
    """Add what installed packages offer (:mod:`router.strategies.plugins`). At start, once; again replaces
    what was added before."""
    for name in _SPECS.keys() - _OWN:
        del _SPECS[name]
    _SPECS.update({spec.name: spec for spec in plugins.load(_OWN)})


__all__ = ["StrategySpec", "describe", "get", "load_plugins", "names"]
