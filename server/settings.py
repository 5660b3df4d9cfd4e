"""The run-config as one checked value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from clients.errors import AppConfigError

__all__ = ["CODES", "LATENCIES", "PRIVACY", "SENDING", "STRATEGIES", "TRACES", "Settings", "whole_numbers"]

STRATEGIES = ("fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "fedprox")
CODES = ("none", "uncoded", "fractional", "cyclic", "universal", "reed-solomon")
PRIVACY = ("none", "shared", "independent", "central")
SENDING = ("coded", "shards", "adaptive")
LATENCIES = (
    *("none", "constant", "lognormal", "shifted-exponential", "pareto", "bimodal", "bursty"),
    *("serverless", "virtual-machines", "phones"),
)
#: A latency that ends so is the absolute path of a file of measured seconds.
TRACES = (".csv", ".npz")
_POLICIES = ("skip", "approximate", "fill-in", "raise")


@dataclass(frozen=True)
class Settings:
    """What `[tool.flwr.app.config]` of pyproject.toml explains, checked."""

    num_server_rounds: int
    num_clients: int
    strategy: str
    code: str
    stragglers: int
    upload_reduction: int
    capacities: str
    code_seed: int
    send: str
    patience: float
    kappa_max: float
    drop_slowest: int
    on_undecodable: str
    timeout: float
    give_up_after: float
    fraction_train: float
    fraction_evaluate: float
    dataset: str
    data_dir: str
    train_examples: int
    partitioner: str
    alpha: float
    owners: int
    model: str
    local_epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    dp: str
    noise_multiplier: float
    target_epsilon: float
    clipping_norm: float
    sample_rate: float
    local_steps: int
    delta: float
    grad_sample_mode: str
    privacy_dir: str
    latency: str
    slow_clients: int
    slow_factor: float
    ledger: str
    checkpoint: str
    results: str

    @classmethod
    def read(cls, run_config: Mapping[str, object]) -> Settings:
        """Check every value before anything starts.

        Raises:
            AppConfigError: Naming the key, the value, and what would be right.
        """
        values = {field.name: _typed(field.name, str(field.type), run_config) for field in fields(cls)}
        settings = cls(**values)  # type: ignore[arg-type]
        settings._check()
        return settings

    def _check(self) -> None:
        _one_of("strategy", self.strategy, STRATEGIES)
        _one_of("code", self.code, CODES)
        if Path(self.latency).suffix not in TRACES:
            _one_of("latency", self.latency, LATENCIES)
        _one_of("on-undecodable", self.on_undecodable, _POLICIES)
        _one_of("send", self.send, SENDING)
        _one_of("dp", self.dp, PRIVACY)
        for key, least in (
            ("num-server-rounds", 1),
            ("num-clients", 0),
            ("stragglers", 0),
            ("upload-reduction", 1),
            ("kappa-max", 0),
            ("patience", 0),
            ("drop-slowest", 0),
            ("slow-clients", 0),
            ("train-examples", 0),
            ("owners", 0),
            ("give-up-after", 0),
            ("slow-factor", 1),
            ("noise-multiplier", 0),
            ("target-epsilon", 0),
        ):
            value = getattr(self, _name(key))
            if not value >= least:
                raise AppConfigError(f"{key}={value} must be at least {least}.")
        for key in ("fraction-train", "fraction-evaluate"):
            value = getattr(self, _name(key))
            if not 0 <= value <= 1:
                raise AppConfigError(f"{key}={value} must lie in 0..1.")
        if not self.timeout > 0:
            raise AppConfigError(f"timeout={self.timeout} must be a number of seconds greater than 0.")
        if self.drop_slowest and self.code != "none":
            raise AppConfigError(
                f"drop-slowest={self.drop_slowest} drops clients, and code={self.code!r} keeps their data: choose one."
            )
        if self.upload_reduction > 1 and self.code not in ("fractional", "universal", "reed-solomon"):
            raise AppConfigError(
                f"upload-reduction={self.upload_reduction} needs code 'fractional', 'universal' or 'reed-solomon', not "
                f"{self.code!r}."
            )
        if self.capacities and self.code not in ("universal", "reed-solomon"):
            raise AppConfigError(
                f"capacities={self.capacities!r} need code 'universal' or 'reed-solomon', not {self.code!r}."
            )
        if self.send != "coded" and (self.kappa_max or self.give_up_after):
            raise AppConfigError(
                f"kappa-max={self.kappa_max} and give-up-after={self.give_up_after} are about coded vectors: with "
                f"send={self.send!r} a message may be one shard, where nothing is amplified. Set both to 0."
            )
        if self.give_up_after and self.latency != "none":
            raise AppConfigError(
                f"give-up-after={self.give_up_after} counts real seconds on the client, and latency={self.latency!r} "
                "makes time virtual: choose one."
            )
        if self.slow_clients and self.latency == "none":
            raise AppConfigError(
                f"slow-clients={self.slow_clients} needs virtual time: choose latency from {', '.join(LATENCIES[1:])}."
            )
        self._check_privacy()
        for key in ("ledger", "checkpoint", "results", "latency", "privacy-dir"):
            path = getattr(self, _name(key))
            if key == "latency" and Path(path).suffix not in TRACES:
                continue
            if path and not Path(path).is_absolute():
                raise AppConfigError(
                    f"{key}={path!r} is a relative path; inside an app the working folder is the engine's, not yours. "
                    "Give an absolute path."
                )

    def _check_privacy(self) -> None:
        if self.dp == "none":
            return
        if bool(self.noise_multiplier) == bool(self.target_epsilon):
            raise AppConfigError(
                f"dp={self.dp!r} takes either noise-multiplier or target-epsilon, which finds it; they are "
                f"{self.noise_multiplier} and {self.target_epsilon}. Set one, and the other to 0."
            )
        if self.dp == "central" and self.code == "none":
            raise AppConfigError("dp='central' adds its noise after decoding: choose a code, be it 'uncoded'.")
        if self.strategy == "fedprox" and self.dp != "central":
            raise AppConfigError("Private training has no proximal term: choose another strategy than fedprox.")


def whole_numbers(text: str) -> list[int]:
    """ "6,6,3" as numbers.

    Raises:
        AppConfigError: It is not such a list.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise AppConfigError(
            f"capacities={text!r} must be whole numbers with commas between, such as '6,6,3'."
        ) from None


def _name(key: str) -> str:
    return key.replace("-", "_")


def _typed(name: str, kind: str, run_config: Mapping[str, object]) -> object:
    key = name.replace("_", "-")
    if key not in run_config:
        raise AppConfigError(f"The run-config has no {key!r}; add it to [tool.flwr.app.config] in pyproject.toml.")
    value = run_config[key]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "int" and not (number and isinstance(value, int)):
        raise AppConfigError(f"{key}={value!r} must be a whole number.")
    if kind == "float":
        if not number:
            raise AppConfigError(f"{key}={value!r} must be a number.")
        return float(value)  # type: ignore[arg-type]
    if kind not in ("int", "float") and not isinstance(value, str):
        raise AppConfigError(f"{key}={value!r} must be a text, in quotes: \"{key}='...'\".")
    return value


def _one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise AppConfigError(f"{key}={value!r} is not known; choose one of {', '.join(known)}.")
