"""Losses that take each record by itself: the mean over records of what each record's own terms give.

PyTorch divides a mean by all terms of a batch. With padded sequences, ignored labels or class weights, the number of
terms depends on every record, so one record more would change the gradients of all others before they are clipped.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .._seeding import generators_restored
from ..errors import PrivacyRefused
from .step_guards import OTHER_RECORDS, Misuse, StepGuard, Unfit

__all__ = [
    "RecordLoss",
    "StandardLosses",
    "all_apart",
    "is_whole",
    "keep_apart",
    "mark",
    "mark_drawn",
    "mean_of",
    "refuse_mixed",
    "synthetic",
    "tensors_in",
]

#: Functions whose means are taken record by record wherever they are called in private training.
_STANDARD: frozenset[Any] = frozenset(
    {
        F.binary_cross_entropy,
        F.binary_cross_entropy_with_logits,
        F.cosine_embedding_loss,
        F.cross_entropy,
        F.gaussian_nll_loss,
        F.hinge_embedding_loss,
        F.huber_loss,
        F.kl_div,
        F.l1_loss,
        F.margin_ranking_loss,
        F.mse_loss,
        F.multi_margin_loss,
        F.multilabel_margin_loss,
        F.multilabel_soft_margin_loss,
        F.nll_loss,
        F.poisson_nll_loss,
        F.smooth_l1_loss,
        F.soft_margin_loss,
        F.triplet_margin_loss,
        F.triplet_margin_with_distance_loss,
    }
)
_MEANS = ("mean", "batchmean")
_ADDS = frozenset({"add", "__add__", "__radd__", "__iadd__", "add_", "sub", "__sub__", "__rsub__", "rsub", "__isub__"})
_SCALES = frozenset({"mul", "__mul__", "__rmul__", "__imul__", "div", "__truediv__", "__itruediv__", "true_divide"})
_KEEPS = frozenset({"neg", "__neg__", "mean", "sum", "squeeze", "to", "float", "double", "clone", "reshape", "view"})
#: Functions that compute each entry of their result from the same entry of their arguments.
_BY_ENTRY = (
    _ADDS
    | _SCALES
    | frozenset(
        {
            *("neg", "__neg__", "pow", "__pow__", "square", "abs", "__abs__", "exp", "log", "log1p", "expm1", "sqrt"),
            *("sigmoid", "tanh", "relu", "softplus", "logsigmoid", "clamp", "clamp_min", "clamp_max"),
            *("float", "double", "to", "clone", "contiguous"),
        }
    )
)
#: Functions along axes, which keep records apart if the first axis is none of them.
_ALONG = frozenset(
    {
        *("sum", "mean", "softmax", "log_softmax", "logsumexp", "amax", "amin", "norm", "normalize"),
        *("squeeze", "unsqueeze", "gather", "select", "narrow"),
    }
)
#: Functions that change the shape alone.
_SHAPES = frozenset({"reshape", "view", "flatten", "contiguous"})
_WHOLE = "_fl_gradcode_whole"  # attribute of a loss that is a mean over records of what each has alone
_APART = "_fl_gradcode_apart"  # attribute of a tensor whose rows belong to one record each
_DRAWN = "_fl_gradcode_drawn"  # attribute of a tensor that was made of records of the batch
_MIXED = "_fl_gradcode_mixed"  # attribute of a tensor that was made of the whole batch, such as its mean
_ROWS = 3  # of synthetic batches
#: Functions that make one number of many.
_REDUCES = frozenset(
    {
        *("sum", "mean", "max", "min", "amax", "amin", "std", "var", "std_mean", "var_mean", "norm", "vector_norm"),
        *("median", "quantile", "prod", "any", "all", "count_nonzero", "logsumexp", "aminmax", "mode"),
    }
)
_COUNTS = frozenset({"bincount", "unique", "histc", "cov", "corrcoef"})

_OF_BATCH = (
    "Something was computed from the whole batch, such as its mean or maximum, and goes into the model or the loss: "
    "one record would move the gradients of all. Compute it for each record alone, or from public numbers."
)
_OTHER = (
    "The loss of a step is neither one of criterion() nor one of PyTorch's loss functions, and no mean of what each "
    "record has alone: pass a loss of your own to criterion(), which takes it record by record, add and scale losses "
    "by numbers alone, and say penalties on weights by penalty()."
)


class _Mean(torch.autograd.Function):
    """The mean, with the gradient of the sum.

    A gradient that is divided by the number of records, and later multiplied by it, would be rounded in another way
    for each number of records.
    """

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        context.shape = values.shape
        return values.mean()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient.expand(context.shape)


def mean_of(losses: Tensor, guard: StepGuard | None = None) -> Tensor:
    """Returns the loss of a batch, whose gradients of single records are those of their own losses.

    Args:
        losses: Loss of each record, or terms of which each record has as many.
        guard: Is told when the loss has its backward pass, and knows the number of records.
    """
    if losses.dim() > 1:
        losses = losses.flatten(1).mean(1)
    loss: Tensor = _Mean.apply(losses)  # type: ignore[no-untyped-call]
    setattr(loss, _WHOLE, True)
    if guard is not None and loss.requires_grad:
        loss.register_hook(lambda _: setattr(guard, "backward", True))  # type: ignore[no-untyped-call]
    return loss


def mark(loss: Tensor) -> Tensor:
    """Note that a loss is a sum over records of what each record has alone; returns it."""
    setattr(loss, _WHOLE, True)
    return loss


def mark_drawn(batch: Tensor) -> Tensor:
    """Note that a tensor names the records of a batch, so that what is made of all of them is known; returns it."""
    setattr(batch, _DRAWN, True)
    return batch


def refuse_mixed(*values: Any) -> None:
    """Refuse tensors that were made of the whole batch.

    Raises:
        Misuse: One of the values is one, or holds one.
    """
    if any(map(_is_mixed, tensors_in(values))):
        raise Misuse(_OF_BATCH)


def unheard() -> Any:
    """Returns a context in which `StandardLosses` hears nothing, since each call costs time."""
    return torch._C.DisableTorchFunction()


def keep_apart(outputs: Any, records: int) -> Any:
    """Note that rows of a model's outputs belong to one record each, equally many to each; returns them."""
    if isinstance(outputs, Tensor):
        if records and outputs.dim() and not outputs.shape[0] % records and outputs.requires_grad:
            setattr(outputs, _APART, True)
        return outputs
    if isinstance(outputs, dict):
        parts: Any = outputs.values()
    elif isinstance(outputs, tuple | list):
        parts = outputs
    else:
        parts = vars(outputs).values() if hasattr(outputs, "__dict__") else ()
    for value in parts:
        if isinstance(value, Tensor | dict | tuple | list):
            keep_apart(value, records)
    return outputs


def is_whole(loss: object) -> bool:
    """Returns whether `mark` noted a loss, or a sum of such losses."""
    return isinstance(loss, Tensor) and getattr(loss, _WHOLE, False) is True


class RecordLoss:
    """A loss function that returns one number for each record.

    Args:
        inner: A loss of PyTorch's, as a module or a function, or any callable of outputs and targets that returns the
            mean over the records of its arguments. What is not PyTorch's is called for each record by itself.

        early: Whether no record was handed out yet, so that which loss it is does not depend on records.

    Attributes:
        of_torch: Whether it is a loss of PyTorch's.

    Raises:
        Misuse: It is a sum over records.
    """

    def __init__(self, inner: Any, *, early: bool = False) -> None:
        if getattr(inner, "reduction", "mean") == "sum":
            raise Misuse("The loss is a sum over records: give criterion() one with reduction='mean'.")
        self._inner, self._early = inner, early
        self.of_torch = type(inner).__module__.startswith("torch.nn.") or _function_of(inner) in _STANDARD
        self._checked = self.of_torch

    def __call__(self, records: int, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the loss of each record, shape (records,).

        Args:
            records: Number of records that were drawn.
            *args: Arguments of the loss; tensors have records along their first axis.
            **kwargs: Further arguments, which are the same for all records.

        Raises:
            Misuse: The loss mixes records, or returns nothing that could be told apart by them.
        """
        if torch.is_grad_enabled() and not all_apart(args, kwargs):
            refuse_mixed(args, kwargs)
            if any(one.dim() and one.shape[0] % records for one in tensors_in((args, kwargs)) if one.requires_grad):
                raise PrivacyRefused(OTHER_RECORDS)
            raise Misuse(
                "The loss is of something else than the model's outputs, or of outputs that were mixed: give "
                "criterion() the outputs as the model returns them, and do the rest in the loss."
            )
        if not self._checked:
            self._checked = True
            try:
                _refuse_mixing(self._inner, args, kwargs)
            except Misuse as error:
                raise (Unfit(str(error)) if self._early else error) from None
        if self.of_torch:
            return self._of_torch(records, args, kwargs)
        if hasattr(self._inner, "reduction"):
            values = _with_reduction_none(self._inner, args, kwargs)
            if values.dim() and values.shape[0] == records:
                return values.flatten(1).mean(1) if values.dim() > 1 else values
        return _one_by_one(self._inner, records, args, kwargs)

    def _of_torch(self, records: int, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        inner = self._inner
        if isinstance(inner, nn.Module):
            summed = getattr(inner, "reduction", "") == "batchmean"
            values = _with_reduction_none(inner, args, kwargs)
            target = kwargs["target"] if "target" in kwargs else args[1] if len(args) > 1 else None
            ignored = getattr(inner, "ignore_index", None)
            return _by_record(values, records, args[:1], target=target, ignored=ignored, summed=summed)
        return _of_function(inner, records, args, kwargs)


class StandardLosses(TorchFunctionMode):
    """While it is entered, PyTorch's loss functions take means by record, and other losses have no backward pass.

    It holds for the thread that entered it.

    Args:
        guard: Knows how many records were drawn, and is told of backward passes.
    """

    def __init__(self, guard: StepGuard) -> None:
        super().__init__()
        self._guard = guard

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of PyTorch's."""
        kwargs = kwargs or {}
        if func is Tensor.backward:
            if self._guard.drawn is not None and not is_whole(args[0]):
                raise Misuse(_OTHER)
            return func(*args, **kwargs)  # type: ignore[no-untyped-call]
        if func in _STANDARD and self._guard.drawn and torch.is_grad_enabled():
            if any(one.requires_grad for one in tensors_in(args)):
                refuse_mixed(args, kwargs)
            if _reduction_of(func, args, kwargs) in _MEANS and all_apart(args, kwargs):
                return mean_of(_of_function(func, self._guard.drawn, args, kwargs), self._guard)
            result = func(*args, **kwargs)
            return keep_apart(result, self._guard.drawn) if all_apart(args, kwargs) else result
        result = func(*args, **kwargs)
        if not self._guard.drawn or not isinstance(result, Tensor | tuple | list):  # most calls read an attribute
            return result
        name = getattr(func, "__name__", "")
        _follow(name, result, args, kwargs, self._guard.drawn)
        if isinstance(result, Tensor) and result.requires_grad:
            if result.dim() == 0:
                if name == "squeeze" and self._guard.drawn == 1 and all_apart(args, kwargs):
                    setattr(result, _APART, True)
                elif _stays_whole(name, args):
                    mark(result)
                elif name == "mean" and len(args) == 1 and not kwargs and _is_apart(args[0]):
                    return mean_of(args[0].reshape(self._guard.drawn, -1), self._guard)
            elif _stays_apart(name, result, args, kwargs, self._guard.drawn):
                setattr(result, _APART, True)
        return result


def _is_apart(value: object) -> bool:
    return getattr(value, _APART, False) is True


def _is_mixed(value: object) -> bool:
    return getattr(value, _MIXED, False) is True


def all_apart(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Returns whether, of the tensors among arguments that gradients flow to, each row belongs to one record.

    False, too, if a tensor among the arguments was made of the whole batch.
    """
    tensors = tensors_in((args, kwargs))
    moving = [one for one in tensors if one.requires_grad]
    return bool(moving) and all(map(_is_apart, moving)) and not any(map(_is_mixed, tensors))


def _follow(name: str, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any], records: int) -> None:
    """Note which tensors were made of the batch's records, and which of all of them together."""
    given = tensors_in((args, kwargs))
    if any(map(_is_mixed, given)):
        noted = _MIXED
    else:
        drawn = [one for one in given if getattr(one, _DRAWN, False)]
        if not drawn:
            return
        noted = _DRAWN
        rows = drawn[0].shape[0] if drawn[0].dim() else 0
        if records > 1 and rows and not rows % records and (name in _REDUCES or name in _COUNTS):
            made = tensors_in(result)
            if name in _COUNTS or any(not one.dim() or one.shape[0] != rows for one in made):
                noted = _MIXED
    for one in tensors_in(result):
        if not one.requires_grad:
            setattr(one, noted, True)


def tensors_in(value: Any) -> list[Tensor]:
    """Returns the tensors in a value, also in what it holds."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [found for one in parts for found in tensors_in(one)]


def _stays_apart(name: str, result: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], records: int) -> bool:
    """Returns whether each row of a result belongs to one record, as rows of the arguments do."""
    tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
    moving = [one for one in tensors if one.requires_grad]
    if not result.dim() or result.shape[0] % records or not moving or not all(map(_is_apart, moving)):
        return False
    if any(map(_is_mixed, tensors)):
        return False
    if name in _BY_ENTRY:  # (n, 1) and (n,) would become a square of all with all
        return all(one.dim() in (0, result.dim()) for one in tensors)
    if len(tensors) > 1 + (name == "gather") or not args:
        return False
    size = tensors[0].dim()
    if name in _SHAPES:
        return True  # rows of one record stay next to each other
    if name == "__getitem__":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        others = index[1:]
        return index[0] in (slice(None), Ellipsis) and all(
            isinstance(one, int | slice) or one is None for one in others
        )
    if name in ("transpose", "swapaxes", "permute", "movedim"):
        axes = args[1] if len(args) == 2 and isinstance(args[1], tuple | list) else args[1:]
        kept = axes[:1] if name == "permute" else axes
        return all((axis % size == 0) == (name == "permute") for axis in kept)
    if name not in _ALONG:
        return False
    place = 2 if name == "normalize" else 1
    given = kwargs.get("dim", kwargs.get("start_dim", args[place] if len(args) > place else None))
    if given is None and name in ("squeeze", "normalize"):
        return name == "normalize" or result.shape[0] == tensors[0].shape[0]
    axes = given if isinstance(given, tuple | list) else (given,)
    return all(isinstance(axis, int) and axis % size for axis in axes)


def _stays_whole(name: str, args: tuple[Any, ...]) -> bool:
    """Returns whether a function makes a mean over records of means over records."""
    tensors = [one for one in args if isinstance(one, Tensor)]
    moving = [one for one in tensors if one.requires_grad]
    if not moving or not all(map(is_whole, moving)):
        return False
    if name in _ADDS or name in _KEEPS:
        return True
    # A factor that is a tensor may be of the batch, such as one over the number of its terms.
    return name in _SCALES and len(tensors) == 1


def _function_of(inner: Any) -> Any:
    """Returns the function that a partial calls, or the callable itself."""
    found = getattr(inner, "func", inner)
    return found if getattr(found, "__hash__", None) is not None else None


@contextmanager
def _reduction_set(loss: Any, value: str) -> Iterator[None]:
    kept = loss.reduction
    loss.reduction = value
    try:
        yield
    finally:
        loss.reduction = kept


def _with_reduction_none(loss: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    with _reduction_set(loss, "none"):
        values: Tensor = loss(*args, **kwargs)
    return values


def _bound(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> inspect.BoundArguments:
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound


def _reduction_of(function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    return str(_bound(function, args, kwargs).arguments.get("reduction", ""))


def _of_function(function: Any, records: int, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """Returns each record's own loss by a function of torch.nn.functional."""
    bound = _bound(function, args, kwargs).arguments
    if bound.get("reduction") == "sum":
        raise Misuse("The loss is a sum over records: give criterion() one with reduction='mean'.")
    summed = bound.get("reduction") == "batchmean"
    values = function(*args, **{**kwargs, "reduction": "none"})
    return _by_record(
        values, records, args[:1], target=bound.get("target"), ignored=bound.get("ignore_index"), summed=summed
    )


def _by_record(
    values: Tensor, records: int, inputs: Sequence[Any], *, target: Any, ignored: int | None, summed: bool = False
) -> Tensor:
    """Returns the mean of each record's terms, without those of ignored labels.

    Args:
        values: The terms, with records along the first axis, or flattened.
        records: Number of records.
        inputs: The outputs of the model, if they are known.
        target: What the loss compares with.
        ignored: Label that does not count; None if there is none.
        summed: Whether a record's terms are added up instead.
    """
    if values.numel() % records:
        raise PrivacyRefused(OTHER_RECORDS)
    if any(isinstance(one, Tensor) and values.numel() > one.numel() for one in inputs):
        raise Misuse(
            "The loss compares each record with all others, since outputs and targets have different shapes: give the "
            "targets the shape of the outputs."
        )
    terms = values.reshape(records, -1)
    if summed:
        return terms.sum(1)
    if not isinstance(target, Tensor) or target.is_floating_point() or target.numel() != terms.numel():
        return terms.mean(1)
    if ignored is not None:
        counted: Tensor = (target.reshape(records, -1) != ignored).sum(1).clamp(min=1)
        return terms.sum(1) / counted
    return terms.mean(1)


def _one_by_one(loss: Any, records: int, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """Returns what a loss gives for each record by itself."""
    values = []
    for number in range(records):
        value = loss(*(_rows(one, records, number) for one in args), **kwargs)
        if not isinstance(value, Tensor):
            raise Misuse("The loss that criterion() was given returns no tensor.")
        values.append(value.mean() if value.dim() else value)
    return torch.stack(values)


def _rows(value: Any, records: int, number: int) -> Any:
    """Returns one record's part of an argument."""
    if isinstance(value, Tensor):
        if not value.dim() or value.shape[0] % records:
            raise PrivacyRefused(OTHER_RECORDS)
        size = value.shape[0] // records
        return value[number * size : (number + 1) * size]
    if isinstance(value, dict):
        return type(value)({key: _rows(one, records, number) for key, one in value.items()})
    if isinstance(value, tuple | list):
        return type(value)(_rows(one, records, number) for one in value)
    return value


def _refuse_mixing(loss: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Refuse a loss of which the mean of single records is not the loss of a batch, tried on synthetic values.

    Raises:
        Misuse: They differ.
    """
    drawn = torch.Generator().manual_seed(0)
    sizes = {one.shape[0] for one in args if isinstance(one, Tensor) and one.dim()}
    if len(sizes) != 1:
        return
    size = sizes.pop()
    try:
        with generators_restored(), torch.no_grad():
            tried = [synthetic(one, size, drawn) for one in args]
            whole = loss(*tried, **kwargs)
            parts = _one_by_one(loss, _ROWS, tried, kwargs)
    except Exception:  # not made for such values: nothing is known
        return
    together = float(whole.float().mean())
    alone = float(parts.float().mean())
    if abs(together - alone) > 1e-3 * max(abs(together), abs(alone)):
        raise Misuse(
            "The loss mixes records: for a batch it is not the mean of what it is for each record alone. Divide by "
            "nothing that depends on other records, and compare none with another."
        )


def synthetic(value: Any, records: int, drawn: torch.Generator, made_for: int = _ROWS) -> Any:
    """Returns a random value of the same form for few records: normal numbers, and whole ones of 0 and 1.

    Args:
        value: What was given for `records` records; tensors and what holds them.
        records: Number of records, the length of tensors along the first axis.
        drawn: Source of the random values.
        made_for: Number of records of the result.
    """
    if isinstance(value, Tensor):
        rows = made_for if value.dim() and value.shape[0] == records else None
        shape = value.shape if rows is None else (rows, *value.shape[1:])
        if value.is_floating_point():
            made: Tensor = torch.randn(shape, generator=drawn).to(value.dtype)
        elif value.dtype == torch.bool:
            made = torch.ones(shape, dtype=torch.bool)
        else:
            made = torch.randint(0, 2, shape, generator=drawn).to(value.dtype)
        return made.to(value.device)
    if isinstance(value, dict):
        return type(value)({key: synthetic(one, records, drawn, made_for) for key, one in value.items()})
    if type(value) in (tuple, list):
        return type(value)(synthetic(one, records, drawn, made_for) for one in value)
    return value
