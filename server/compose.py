"""Settings to objects: which strategy, which code, which latency."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi

from clients.errors import AppConfigError
from fl_gradcode import Adaptive, Approximation, Coded, GradientCode, GradientCoding, Shards
from fl_gradcode.codes import cyclic_repetition, for_assignment, fractional_repetition, reed_solomon, uncoded
from fl_gradcode.latency import (
    Latency,
    Law,
    bimodal,
    bursty,
    constant,
    lognormal,
    named,
    pareto,
    read_trace,
    replay,
    scaled,
    shifted_exponential,
    trace,
)
from fl_gradcode.placement import Assignment, assign
from fl_gradcode.privacy import DPSGD, CentralNoise, noise_multiplier_for
from server.settings import Settings, whole_numbers

__all__ = ["make_code", "make_coding", "make_latency", "make_privacy", "make_strategy"]

_FIXED_SHARE = 0.2  # of a healthy client's time for one shard; the rest grows with the number of shards


def make_strategy(settings: Settings) -> FedAvg:
    """Flower's strategy of that name. One client is enough to go on: who must answer is decided elsewhere."""
    common = {
        "fraction_train": settings.fraction_train,
        "fraction_evaluate": settings.fraction_evaluate,
        "min_train_nodes": 1,
        "min_evaluate_nodes": 1,
        "min_available_nodes": 1,
    }
    match settings.strategy:
        case "fedavgm":
            return FedAvgM(**common, server_momentum=0.9)  # type: ignore[arg-type]
        case "fedadam":
            return FedAdam(**common)  # type: ignore[arg-type]
        case "fedyogi":
            return FedYogi(**common)  # type: ignore[arg-type]
        case "fedadagrad":
            return FedAdagrad(**common)  # type: ignore[arg-type]
        case "fedprox":
            return FedProx(**common, proximal_mu=0.1)  # type: ignore[arg-type]
        case _:
            return FedAvg(**common)  # type: ignore[arg-type]


def make_code(settings: Settings, n: int) -> GradientCode:
    """The code for n clients, whose own data are the n shards."""
    s, m = settings.stragglers, settings.upload_reduction
    match settings.code:
        case "uncoded":
            return uncoded(n)
        case "cyclic":
            return cyclic_repetition(n, s, rng=np.random.default_rng(settings.code_seed))
        case "universal":
            rng = np.random.default_rng(settings.code_seed)
            if settings.capacities:
                return for_assignment(_assignment(settings, n), s=s, m=m, rng=rng)
            return for_assignment(np.ones((n, n), bool), s=s, m=m, holders=s + m, rng=rng)
        case "reed-solomon":
            return reed_solomon(n, s, m=m, assignment=_assignment(settings, n) if settings.capacities else None)
        case _:
            # The first clients may always be slow: dealt one to a group, none waits for two of them.
            return fractional_repetition(n, s, m=m)


def make_privacy(settings: Settings, holders: int = 1) -> DPSGD | CentralNoise | None:
    """What the run promises; with a target, the noise that it takes for all rounds.

    Args:
        settings: The run-config.
        holders: Of the shard with most.
    """
    common: dict[str, Any] = {"delta": settings.delta, "noise_multiplier": settings.noise_multiplier}
    if settings.dp == "none":
        return None
    if settings.dp == "central":
        if settings.target_epsilon:
            common["noise_multiplier"] = noise_multiplier_for(
                settings.target_epsilon, settings.delta, sample_rate=1.0, steps=settings.num_server_rounds
            )
            common["max_epsilon"] = settings.target_epsilon
        return CentralNoise(clipping_norm=settings.clipping_norm, **common)
    steps: dict[str, Any] = {
        "max_grad_norm": settings.clipping_norm,
        "sample_rate": settings.sample_rate,
        "steps": settings.local_steps,
        "noise": settings.dp,
        "grad_sample_mode": settings.grad_sample_mode,
    }
    if not settings.target_epsilon:
        return DPSGD(**common, **steps)
    rounds = settings.num_server_rounds
    return DPSGD.for_epsilon(settings.target_epsilon, rounds=rounds, holders=holders, delta=settings.delta, **steps)


def make_send(settings: Settings) -> Coded | Shards | Adaptive:
    """What a message asks for."""
    if settings.send == "coded":
        return Coded(kappa_max=settings.kappa_max or float("inf"), give_up_after=settings.give_up_after or None)
    return Shards(patience=settings.patience) if settings.send == "shards" else Adaptive()


def make_coding(settings: Settings, inner: FedAvg, n: int) -> GradientCoding:
    """The inner strategy, coded."""
    policy: Any = settings.on_undecodable
    code = make_code(settings, n)
    return GradientCoding(
        inner,
        code,
        privacy=make_privacy(settings, max(len(code.holders_of(j)) for j in range(code.k))),
        send=make_send(settings),
        on_undecodable=Approximation(fill_in=True) if policy == "fill-in" else policy,
        seed=settings.seed,
        ledger=settings.ledger or None,
        checkpoint=settings.checkpoint or None,
    )


def _assignment(settings: Settings, n: int) -> Assignment:
    """Everybody's own data, and others' as far as capacities allow."""
    capacities = whole_numbers(settings.capacities)
    if len(capacities) != n:
        raise AppConfigError(
            f"capacities={settings.capacities!r} are {len(capacities)} numbers; there are {n} clients."
        )
    least = settings.stragglers + settings.upload_reduction
    if settings.code == "reed-solomon":
        return assign(n, capacities, holders=least, owners=range(n))
    # More holders than s + m keep decoding over the reals from amplifying noise; beyond two more it gains little.
    most = assign(n, capacities, m=settings.upload_reduction, owners=range(n)).replication
    return assign(n, capacities, holders=max(least, min(most, least + 2)), owners=range(n))


def make_latency(settings: Settings) -> Latency:
    """A healthy client takes about a second for one shard, 80 % of it compute; the first clients are slower."""
    slow = dict.fromkeys(range(settings.slow_clients), settings.slow_factor)
    if settings.latency in ("serverless", "virtual-machines", "phones"):
        latency = named(settings.latency, 1 - _FIXED_SHARE)
        slowdown = latency.slowdown if isinstance(latency.slowdown, Law) else constant(latency.slowdown)
        return replace(latency, slowdown=scaled(slowdown, slow))
    laws: dict[str, Law] = {
        "constant": constant(1.0),
        "lognormal": lognormal(1.0, 0.3),
        "shifted-exponential": shifted_exponential(0.5, 0.5),
        "pareto": pareto(2.5, 0.6),
        "bimodal": bimodal(0.05, 10.0, jitter=0.1),
        "bursty": bursty(0.02, 0.2, 10.0, jitter=0.1),
    }
    law = laws[settings.latency] if settings.latency in laws else _measured(settings.latency)
    law = scaled(law, slow)
    return Latency(fixed=_times(law, _FIXED_SHARE), compute=_times(law, 1 - _FIXED_SHARE))


def _measured(path: str) -> Law:
    """One column a worker and one row a round, or one column: a sample for all."""
    table = read_trace(path)
    return replay(table) if table.ndim == 2 and table.shape[1] > 1 else trace(table)


def _times(law: Law, share: float) -> Law:
    return Law(f"{share:g} x {law.name}", lambda seed, worker, tick: share * law.draw(seed, worker, tick))
