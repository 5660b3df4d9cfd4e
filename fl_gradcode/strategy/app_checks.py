"""Checks that the clients' app meets the contract of gradient coding.

The contract is that an update depends on the message, the shard and the seeded generators, and on nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from .._flower_internals import caller_among
from .._text import numbered
from ..errors import IncompatibleStrategy, UnsuitableApp
from ..privacy import clipping_mod_named_in
from ..protocol import Plan, RejectionKind
from .replies import ReplyCollector
from .wrapped import PRIVACY_WRAPPERS

__all__ = ["broken_promises", "odd_ones_out", "refuse_unsuitable", "refuse_wrappers"]


def refuse_wrappers() -> None:
    """Refuse to run inside one of Flower's privacy wrappers, which would clip coded sums.

    Raises:
        IncompatibleStrategy: A privacy wrapper is among the callers. The message says what to do instead.
    """
    outer = caller_among(PRIVACY_WRAPPERS)
    if outer is not None:
        raise IncompatibleStrategy(
            f"{type(outer).__name__} cannot be put around GradientCoding: it clips and noises single replies, and "
            "a coded reply is a sum over shards. Remove it and use GradientCoding(..., "
            "privacy=CentralNoise(...)), which clips each shard's update and adds noise once after "
            "decoding, or privacy=DPSGD(...)."
        )


#: A node that refuses with one of these kinds keeps refusing until its configuration changes.
_FINAL: frozenset[RejectionKind] = frozenset({"unsuitable-app", "invalid-setting", "version", "shard-mismatch"})


def refuse_unsuitable(replies: ReplyCollector, *, ever_decoded: bool) -> None:
    """End the run if its clients can never answer correctly.

    Raises:
        UnsuitableApp: The app does not choose its data by `partition-id`, or no client has the mod, or the
            configuration of every client rules out a reply.
    """
    if ever_decoded:
        return  # the app works: a client that fails from now on counts as a straggler
    if replies.other_environments and not odd_ones_out(replies):
        raise UnsuitableApp(_of_other_kinds(replies))
    rejections = sorted({rejected.rejection for rejected in replies.rejected}, key=lambda rejection: rejection.reason)
    kinds = {rejection.kind for rejection in rejections}
    refusing = {rejected.node for rejected in replies.rejected}
    if len(refusing) <= max(len({*replies.answered}), _tolerance(replies.plan)):
        return  # so few do not end the run of the others
    if kinds == {"fixed-data"}:
        raise UnsuitableApp(
            f"The clients' {replies.plan.kind}() never read context.node_config['partition-id'], so it would use the "
            "same data for every shard. Choose the data by partition-id at every call, or pass allow_fixed_data=True."
        )
    if replies.answered:
        return
    if kinds <= _FINAL:
        raise UnsuitableApp(f"No client can take part: {rejections[0].reason}")
    if kinds == {"clipping-mod"}:
        if replies.plan.as_returned:
            raise UnsuitableApp(
                "No client can take part: the app lists a clipping mod before gradient_coding_mod, where it sees the "
                "plan of the round beside the config. List gradient_coding_mod first."
            )
        raise UnsuitableApp(f"No client can take part: {clipping_mod_named_in(rejections[0].reason)}")
    if kinds == {"no-mod"}:
        raise UnsuitableApp(
            "The clients answered without coding. Add the mod to their app: ClientApp(mods=[gradient_coding_mod])."
        )


def broken_promises(replies: ReplyCollector) -> Iterator[tuple[str, str]]:
    """Yields (key, warning) for each part of the contract that the replies break; warn of each key once a run."""
    if replies.stateful:
        yield (
            "state",
            "train() or evaluate() keeps something in context.state. Holders of a shard must compute the same update, "
            "but one that misses a round misses its state too. An update may depend only on the message, the shard "
            "and the seeded generators.",
        )
    if replies.kept_file:
        yield (
            "file",
            f"train() reads and rewrites a file ({replies.kept_file!r}), so it keeps something from one call to the "
            "next. A holder that misses a round, or has a disk of its own, misses it too, and its updates differ from "
            "then on. `fl-gradcode check` says whether the update depends on it.",
        )
    if replies.fixed_data:
        yield (
            "fixed data",
            "evaluate() never read context.node_config['partition-id']. That is fine if every client evaluates on the "
            "same data; if each has its own, choose it by partition-id.",
        )
    if replies.other_environments:
        yield "environments", _of_other_kinds(replies, odd_ones_out(replies))
    if replies.other_requests:
        shard, (one, other) = next(iter(replies.other_requests.items()))
        yield (
            "requests",
            f"Holders of shards {sorted(replies.other_requests)} (workers {one} and {other} of shard {shard}) bound "
            "their noise to different requests, so it differs: they got other weights or settings, or have other keys, "
            "data, or versions of torch and opacus.",
        )
    alike = replies.copies.alike
    if alike is not None and not replies.plan.allow_fixed_data:
        yield (
            "alike",
            f"{alike.sentence} If their data differ, the app does not choose them by partition-id at each call: is a "
            "loader or a data set kept in a variable?",
        )


def odd_ones_out(replies: ReplyCollector) -> list[int]:
    """Returns the workers that compute with other devices or versions than most, if the code can do without them."""
    kinds = Counter(environment.partition(";")[0] for environment in replies.environments.values())
    if len(kinds) < 2:
        return []
    (common, number), *_ = kinds.most_common()
    odd = [worker for worker, said in sorted(replies.environments.items()) if said.partition(";")[0] != common]
    return odd if len(odd) <= _tolerance(replies.plan) and len(odd) < number else []


def _tolerance(plan: Plan) -> int:
    """Returns how many workers may be missing for sure before a shard lacks a holder."""
    holders = Counter(shard for row in plan.rows.values() for shard in row.shards)
    return min(holders.values(), default=1) - 1


def _of_other_kinds(replies: ReplyCollector, odd: Sequence[int] = ()) -> str:
    shard, ((one, its), (other, others)) = next(iter(sorted(replies.other_environments.items())))
    return (
        f"Holders of shard {shard} train with different devices or versions: worker {one} with {its}, worker {other} "
        f"with {others}. Under shared noise their updates would differ by more than rounding, and the difference has "
        "no noise. Give all holders of a shard the same kind, or say DPSGD(noise='independent')."
        + (f" The run goes on without {numbered('worker', odd)}." if odd else "")
    )
