"""Private training of one shard inside a user's `train()`: a `with` block that charges, and draws batches and noise."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message

from .._seeding import generators_restored, seed_with
from ..errors import InvalidSetting, PrivacyRefused
from ..protocol import PARTITION_ID
from .attempts import Session, current_attempts
from .budget_ledger import SPENT, BudgetLedger, Charge, Request, refuse_other_unit
from .key_derivation import SECRET_BYTES, KeyContext, PRFStream, derived_seed, folder_of, key_context, needed
from .keys import read_keys
from .record_losses import mark_drawn
from .records import Asked, Spent, asked_of, budget_of, max_delta_of, refuse_mode, trusts_server
from .settings import DPSGD
from .step_guards import Misuse

if TYPE_CHECKING:
    from .dp_optimizer import KeyedDPOptimizer, KeyedNoise, PrivateModel

__all__ = ["PrivateTraining", "private_training"]


def private_training(
    message: Message,
    context: Context,
    model: torch.nn.Module,
    *,
    examples: int,
    weight: float | None = None,
    manifest: str = "",
    binding: Mapping[str, Any] | None = None,
) -> PrivateTraining:
    """Returns a context manager for DP-SGD as the server asked for it, on the shard that `context` names.

    Use it in `train()`:

        with private_training(message, context, model, examples=len(y)) as dp:
            optimizer = dp.optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
            criterion = dp.criterion(torch.nn.CrossEntropyLoss())
            for batch in dp.batches():
                optimizer.zero_grad()
                criterion(dp.model(x[batch]), y[batch]).backward()
                optimizer.step()

    Then reply with the arrays of `model`, `num-examples` and `dp.record`. Entering charges the shard's ledger, or
    refuses. Afterwards `model` is plain again.

    Args:
        message: As `train()` got it.
        context: As `train()` got it. Its node config names the node's folder with keys and ledger by `privacy-dir`, or
            the run config a folder with one for each worker; and the data owner's own `max-epsilon`, over all runs.
        model: With the weights of the message, and with layers that do not mix records.
        examples: Number of records of the shard. It is public: it weighs the update, as the reply's `num-examples`.
        weight: What the reply says instead, if anything else; public too.
        manifest: What the shard's data are, such as a digest of its records: holders with other data then get other
            keys, which shows.
        binding: Whatever else the result depends on and somebody else decides, as JSON values. The message, the run
            config, the model's weights and the run's seed are bound already.

    Raises:
        PrivacyRefused: Over budget, or a second, different request for a round; or the model is not fit for it.
        InvalidSetting: Keys or ledger are missing, damaged or open to others; or the message asks for no privacy.
    """
    asked = asked_of(message, context)
    if asked is None or not isinstance(asked.privacy, DPSGD):
        raise InvalidSetting(
            "This message asks for no private training. Say GradientCoding(..., privacy=DPSGD(...)) on the server, or "
            "train without."
        )
    # Past a config that watches who reads it: this is not the app choosing its data.
    given = dict.get(context.node_config, PARTITION_ID)
    if given != asked.shard:
        raise InvalidSetting(
            f"The message asks for shard {asked.shard}, and {PARTITION_ID} is {given!r}: one shard's records would be "
            "charged to another's ledger."
        )
    bound_too = {**dict(binding or {}), "fl-gradcode.weight": examples if weight is None else weight}
    return PrivateTraining(asked, asked.privacy, message, context, model, examples, manifest, bound_too)


class PrivateTraining:
    """One shard's private training in one round; made by `private_training`.

    Attributes:
        model: The model to call in training, which keeps single records' gradients. It shares its weights with the
            plain model.
        epsilon: Spent in this run, this round included.
    """

    def __init__(
        self,
        asked: Asked,
        privacy: DPSGD,
        message: Message,
        context: Context,
        model: torch.nn.Module,
        examples: int,
        manifest: str,
        binding: dict[str, Any],
    ) -> None:
        self.model: Any = None
        self.epsilon = 0.0
        self._asked, self._privacy, self._message, self._context = asked, privacy, message, context
        self._plain, self._examples, self._manifest, self._binding = model, examples, manifest, binding
        self._open = ExitStack()
        self._session: Session
        self._wrapped: PrivateModel
        self._steps = 0
        self._generators = b""
        self._record: ConfigRecord | None = None

    def __enter__(self) -> PrivateTraining:
        from .dp_optimizer import PrivateModel  # imports Opacus, which takes seconds
        from .model_checks import refuse_unfit

        self._check_examples()
        refuse_mode(self._context, self._privacy.grad_sample_mode)
        refuse_unfit(self._plain)
        shared = self._privacy.noise == "shared"
        folder = folder_of(self._context, self._asked)
        keys = read_keys(needed(folder, "the key of its shards")) if shared else None
        bound = self._bound_to(keys.generation if keys else 0)
        attempts = current_attempts()
        session = attempts.session if attempts is not None else None
        if session is not None and not session.complete and session.digest != bound.digest:
            raise Misuse(
                "train() asks for something else each time that it is called: it depends on a clock or chance."
            )
        if session is None or session.complete:
            # Without keys of shards: keys of this one answer.
            secret = os.urandom(SECRET_BYTES) if keys is None else keys.secret(self._asked.shard)
            holders = max(self._asked.holders, keys.holders_of(self._asked.shard) if keys else 1)
            charge = self._charge(folder, bound, holders, repeatable=shared)
            session = Session(bound.digest, charge, secret, self._sources(bound, secret))
            if attempts is not None:
                attempts.session = session
        secret, charge = session.secret, session.charge
        wrapped = PrivateModel(
            self._plain,
            mode=self._privacy.grad_sample_mode,
            max_grad_norm=self._privacy.max_grad_norm,
            noise=session.noise,
        )
        self._open.callback(wrapped.unwrap)
        # The server knows the seed of the mod's generators: dropout and the like are drawn from the key instead.
        self._open.enter_context(generators_restored())
        self._generators = bound.derive(secret, "generators")
        seed_with(int.from_bytes(self._generators[:8], "little"))
        self._open.enter_context(_without_hook_warnings())
        self._open.enter_context(wrapped.losses)
        self._session, self._wrapped, self.model = session, wrapped, wrapped.model
        self.epsilon = charge.run_epsilon
        self.record = Spent(
            self._asked.shard,
            self._asked.round,
            # Keyed: a plain digest would tell whoever guesses the manifest whether the guess is right.
            bound.derive(secret, "digest").hex() if shared else "",
            charge.run_epsilon,
            charge.total_epsilon,
            self._privacy.delta,
            self._binding["fl-gradcode.weight"],
            _environment_of(self._plain),
        ).to_record()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._open.close()
        if kind is not None:
            return
        self._wrapped.check_unchanged()
        if not self._wrapped.steps == self._steps == self._privacy.steps:
            raise PrivacyRefused(
                "Training ended before its last step: when it ends must not depend on the records. Take one step for "
                "each batch of batches(), and choose fewer by DPSGD(steps=...)."
            )
        self._session.complete = True

    @property
    def record(self) -> ConfigRecord:
        """The record of what was spent, for the reply; there once the `with` block has ended with all steps taken.

        Raises:
            PrivacyRefused: The block has not ended, or not all steps were taken.
        """
        if self._record is None or not self._session.complete:
            raise PrivacyRefused(
                "The record of private training exists only after its with block, and only if all steps were taken: "
                "build the reply after the block."
            )
        return self._record

    @record.setter
    def record(self, record: ConfigRecord) -> None:
        self._record = record

    def optimizer(
        self, inner: torch.optim.Optimizer, *, schedule: Callable[[int], float] | None = None
    ) -> torch.optim.Optimizer:
        """Returns an optimizer that gives `inner` clipped and noisy gradients; take one step with it for each batch.

        Call it before `batches`. The settings of `inner` stay what they are then: a loop that changed them could do so
        by what it sees of the data.

        Args:
            inner: A new optimizer of the model's parameters.
            schedule: Factor of its learning rates in each step of the round, by the step's number from 0.

        Raises:
            PrivacyRefused: `inner` was used before, has other parameters than the model's, or a learning rate above
                1e6 or below 0.
        """
        if inner.state:
            raise Misuse(
                "The optimizer keeps something of earlier steps: make a new one for each shard and round. State would "
                "carry data from shard to shard, and holders would differ."
            )
        batch = self._privacy.sample_rate * self._examples
        optimizer = self._wrapped.optimizer(inner, expected_batch_size=batch, schedule=schedule)
        session = self._session
        if session.careful and session.step:  # the steps before are done
            inner.load_state_dict(copy.deepcopy(session.inner))
            self._wrapped.restore(session.weights)
            self._wrapped.resume_at(session.step)
        return optimizer

    def criterion(self, inner: Any) -> Any:
        """Returns the loss function to call in training: the mean over records of what each has alone.

        Each record's terms are divided by their own number, without those of ignored labels, whatever other records are
        in the batch. For records of one length that is the loss as written.

        Args:
            inner: A loss of PyTorch's with reduction="mean", as a module or a function, or any callable of outputs and
                targets, records first, which is then called for each record by itself.

        Raises:
            PrivacyRefused: The loss is a sum over records.
        """
        return self._wrapped.criterion(inner)

    def penalty(self, function: Callable[[], torch.Tensor]) -> None:
        """Add a term to the loss that is of the weights alone, such as FedProx's or an L2 penalty.

            start = [p.detach().clone() for p in model.parameters()]
            dp.penalty(lambda: mu / 2 * sum(((p - s) ** 2).sum() for p, s in zip(model.parameters(), start)))

        Its gradient is added after the noise, in each step, also of empty batches. It must not depend on records. Call
        this before `batches`.

        Args:
            function: Returns the term at the present weights, as one number.
        """
        if not callable(function):
            raise Misuse("penalty() takes a function of no arguments that returns the term at the present weights.")
        if self._wrapped.begun:
            raise Misuse("Penalties come before the batches: call penalty() once, before batches().")
        self._wrapped.penalties.append(function)

    def batches(self) -> Iterator[torch.Tensor]:
        """Yields the round's batches: indices of records, int64, shape (size of the batch,).

        Each record is in each batch with probability `sample_rate`, independently of all others. A batch may be empty:
        it takes its step, of noise alone, without being yielded. After a failure, records come one by one.

        Raises:
            PrivacyRefused: The last batch had no step, or `optimizer` was not called yet.
        """
        optimizer = self._wrapped.inner
        if optimizer is None:
            raise Misuse("The optimizer comes before the batches: call optimizer() first.")
        session = self._session
        self._steps = session.step if session.careful else 0
        while self._steps < self._privacy.steps:
            self._steps += 1
            if session.chosen is None:
                drawn = session.sampling.uniform(self._examples) < self._privacy.sample_rate
                session.chosen = np.flatnonzero(drawn).tolist()
            if session.careful:
                yield from self._one_by_one(optimizer)
                continue
            chosen, session.chosen = session.chosen, None
            if not chosen:
                optimizer.take(None)
                continue
            self._wrapped.batch_drawn(len(chosen))
            session.drawn, session.reached = True, self._steps
            yield mark_drawn(torch.tensor(chosen))
            if self._wrapped.steps != self._steps:
                raise PrivacyRefused(_NO_STEP)

    def _one_by_one(self, optimizer: KeyedDPOptimizer) -> Iterator[torch.Tensor]:
        """Yield a batch record by record, without those that had their turn, and take its step."""
        session = self._session
        for record in [one for one in session.chosen or () if one not in session.tried]:
            session.in_flight, session.drawn = record, True
            optimizer.parts = session.parts or optimizer.nothing()
            # Whatever is drawn for a record does not depend on which other records failed.
            seed_with(derived_seed(self._generators, self._steps, record))
            self._wrapped.batch_drawn(1)
            yield torch.tensor([record])
            if not self._wrapped.stepped:
                raise PrivacyRefused(_NO_STEP)
            self._wrapped.check_unchanged()  # while it is known at which record something changed
            session.had_its_turn(optimizer.parts)
        sums, optimizer.parts = session.parts, None
        optimizer.take(sums)
        weights = [p.detach().clone() for p in self.model.parameters()]
        session.step_taken(weights, optimizer.original_optimizer.state_dict())

    def _sources(self, bound: KeyContext, secret: bytes) -> Callable[[], tuple[KeyedNoise, PRFStream]]:
        """Returns what makes the sources of noise and batches, each from its beginning."""
        from .dp_optimizer import KeyedNoise

        def start() -> tuple[KeyedNoise, PRFStream]:
            noise = PRFStream(bound.derive(secret, "noise"))
            made = KeyedNoise(noise, self._privacy.noise_multiplier, steps=self._privacy.steps)
            return made, PRFStream(bound.derive(secret, "sample"))

        return start

    def _check_examples(self) -> None:
        here = f"Shard {self._asked.shard}"
        if self._examples < 1:
            raise PrivacyRefused(f"{here} has no records; private training needs at least one.")
        if self._privacy.delta * self._examples >= 1:
            raise PrivacyRefused(
                f"{here}: delta={self._privacy.delta:g} is not below 1 over the number of its records, and would allow "
                "to publish one of them. Choose a delta far below that."
            )

    def _bound_to(self, generation: int) -> KeyContext:
        return key_context(
            self._asked,
            self._message,
            self._context,
            self._plain,
            manifest=f"{self._examples}|{self._manifest}",
            others={**self._binding, "fl-gradcode.keys": generation},
        )

    def _charge(self, folder: Path | None, bound: KeyContext, holders: int, *, repeatable: bool) -> Charge:
        budget = budget_of(self._context)
        privacy = replace(self._privacy, honest_server=self._privacy.honest_server and trusts_server(self._context))
        if folder is None and budget == float("inf"):
            # No record is kept here: as if every round so far had been answered.
            epsilon = privacy.epsilon(max(1, self._asked.round), holders=holders)
            if epsilon > self._privacy.max_epsilon:
                raise PrivacyRefused(
                    f"Shard {self._asked.shard}, round {self._asked.round}: it would bring this run to epsilon "
                    f"{epsilon:.3g} (delta {self._privacy.delta:g}), above the budget of {self._privacy.max_epsilon:g}."
                )
            return Charge(epsilon, epsilon, True)
        folder = needed(folder, "a ledger of what it spends")
        if budget < float("inf"):
            refuse_other_unit(folder, SPENT, self._asked.shard)
        ledger = BudgetLedger(folder / SPENT)
        request = Request(
            self._asked.shard,
            self._asked.run,
            self._asked.round,
            bound.digest,
            privacy.spend(1, holders=holders),
            self._asked.earlier_rounds if privacy.honest_server else range(1, self._asked.round),
            repeatable,
            bound.manifest.hex(),
        )
        return ledger.charge(
            request,
            delta=self._privacy.delta,
            accountant=self._privacy.accountant,
            run_budget=self._privacy.max_epsilon,
            budget=budget,
            budget_delta=min(self._privacy.delta, max_delta_of(self._context)),
        )


def _environment_of(model: torch.nn.Module) -> str:
    """Returns what a model is trained with: kind of device, settings that change results, versions; and threads.

    Threads come last, since they change results by rounding alone.
    """
    device = next(model.parameters()).device
    kind = device.type
    if kind == "cuda":
        tf32 = torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32
        kind = f"{torch.cuda.get_device_name(device)}{', tf32' if tf32 else ''}"
    settled = ", deterministic" if torch.are_deterministic_algorithms_enabled() else ""
    return f"{kind}{settled}, {_versions()}; {torch.get_num_threads()} threads"


@cache
def _versions() -> str:
    """Returns the versions that results depend on; reading them from disk takes milliseconds, and is done once."""
    return ", ".join(f"{name} {version(name).partition('+')[0]}" for name in ("torch", "opacus"))


_NO_STEP = (
    "A batch without a step of its own: call step() of the optimizer that optimizer() returned once for each batch of "
    "batches(), before the next is drawn."
)


@contextmanager
def _without_hook_warnings() -> Iterator[None]:
    """PyTorch warns at each backward pass that the inputs need no gradients, which is so by design."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        yield
