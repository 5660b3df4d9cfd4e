"""Which models can be trained privately: told by kind before data are read, and by a trial on synthetic input.

The trial tells nothing of records or of the weights that a server sends: it runs with random values of both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._seeding import generators_restored, seed_with
from ._opacus import ModuleValidator
from .record_gradients import GhostModule, HooksModule, forget_pass, full_precision
from .record_losses import mark, synthetic, tensors_in
from .step_guards import Misuse, Unfit, same_bits

__all__ = ["misuse_in", "refuse_unfit", "trainable_layers_in_training", "try_out"]

_DTYPES = (torch.float32, torch.float64)
_TOLERANCE = 1e-3
#: Numbers of synthetic records, and how large the others are beside the first.
_SIZES = (3, 16)
_SCALES_TRIED = (1.0, 1.0, 0.01, 100.0)
_tried: set[Any] = set()  # what was found fit in this process
#: Attributes of any module, and what Opacus leaves there.
_OF_ANY = {*vars(nn.Module()), "autograd_grad_sample_hooks", "activations", "max_batch_len"}
_INSTEAD = (
    "opacus.validators.ModuleValidator.fix(model) makes one that can, such as GroupNorm for BatchNorm; use it on the "
    "server too."
)


def refuse_unfit(model: nn.Module) -> None:
    """Refuse models that mix records by their kind of layers, or that Opacus cannot train.

    Raises:
        Misuse: The model has BatchNorm that would normalise by the batch, layers whose gradients Opacus cannot tell
            apart, or is trained at less than single precision.
    """
    if any(p.requires_grad and p.dtype not in _DTYPES for p in model.parameters()):
        raise Misuse(
            "Parameters that are trained must be float32 or float64: coarser numbers round clipped gradients above the "
            "clipping norm. Call model.float() first."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise Misuse("The model has no parameter that is trained: unfreeze one.")
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            trained = any(p.requires_grad for p in module.parameters(recurse=False))
            if module.training or trained or module.running_mean is None:
                raise Misuse(
                    f"This model cannot be trained with differential privacy: {name or 'it'} is BatchNorm "
                    f"({type(module).__name__}), which mixes the records of a batch. Freeze it and call its eval(), or "
                    f"take another: {_INSTEAD}"
                )
    if hasattr(model, "autograd_grad_sample_hooks"):
        raise Misuse(
            "The model has been made private already: give private_training the plain model, and use no PrivacyEngine "
            "beside it."
        )
    with trainable_layers_in_training(model):
        errors = ModuleValidator.validate(model, strict=False) if model.training else _errors_of(model)
    if errors:
        raise Misuse(
            f"This model cannot be trained with differential privacy: {str(errors[0]).rstrip('.')}. {_INSTEAD}"
        )


def _errors_of(model: nn.Module) -> list[Any]:
    """Returns what Opacus finds wrong with a model that is in eval(), which it would refuse for that alone."""
    model.training = True  # this module's own flag, which its layers do not share
    try:
        return list(ModuleValidator.validate(model, strict=False))
    finally:
        model.training = False


@contextmanager
def trainable_layers_in_training(model: nn.Module) -> Iterator[None]:
    """Set the layers with trained parameters of their own to training, which Opacus needs, and leave all others.

    Dropout that is in eval() stays so.
    """
    flags = [(module, module.training) for module in model.modules()]
    for module, _ in flags:
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            module.training = True
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def try_out(wrapped: HooksModule | GhostModule, args: tuple[Any, ...], kwargs: dict[str, Any], records: int) -> None:
    """Run a model on few synthetic records, of the form of a batch that it was given.

    What cannot be run so is left alone. A model that was found fit is not tried again in this process.

    Args:
        wrapped: The model.
        args, kwargs: Arguments of a forward pass.
        records: Number of records of that batch.

    Raises:
        Unfit: A record's output depends on other records, a buffer changes, or Opacus' gradients of single records are
            not those of the model.
    """
    key = _form_of(wrapped, args, kwargs, records)
    if key in _tried:
        return
    kept = [p.detach().clone() for p in wrapped.parameters()]
    buffers = {name: (buffer, buffer.clone()) for name, buffer in wrapped.named_buffers()}
    grads = [p.grad for p in wrapped.parameters()]
    try:
        with generators_restored(), full_precision():
            _randomise(wrapped)
            _try_together(wrapped, args, kwargs, records)
            _try_gradients(wrapped, args, kwargs, records)
        for name, buffer in wrapped.named_buffers():
            if name not in buffers or not same_bits(buffer, buffers[name][1]):
                raise Unfit(
                    f"A forward pass changes {name.removeprefix('_module.')!r}, which is no parameter and gets no "
                    "noise: it would tell of the data. Use layers without running statistics or counters."
                )
        _tried.add(key)
    finally:
        with torch.no_grad():
            for buffer, values in buffers.values():
                buffer.copy_(values)
            for p, values, grad in zip(wrapped.parameters(), kept, grads, strict=True):
                p.copy_(values)
                p.grad = grad
        forget_pass(wrapped)
        wrapped.enable_hooks()


def _form_of(wrapped: Any, args: Any, kwargs: Any, records: int) -> Any:
    """Returns what a verdict holds for: the kinds and settings of layers, and the form of the input."""

    def form(value: Any) -> Any:
        if isinstance(value, Tensor):
            own = bool(value.dim()) and value.shape[0] == records
            return ("tensor", value.dtype, None if own else tuple(value.shape), tuple(value.shape[1:]) if own else ())
        if isinstance(value, dict):
            return tuple((key, form(one)) for key, one in value.items())
        if isinstance(value, tuple | list):
            return tuple(map(form, value))
        return repr(value)

    layers = tuple((type(module), module.training, *_settings_of(module)) for module in wrapped._module.modules())
    trained = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in wrapped.named_parameters())
    return (layers, repr(wrapped), trained, form(args), form(kwargs))


def _settings_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields whatever may change what a layer computes, which its text need not show: attributes and forward hooks."""
    for name, value in vars(module).items():
        if name not in _OF_ANY and not isinstance(value, nn.Module | Tensor):
            yield name, _text_of(value)
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        yield "hooks", tuple(map(_text_of, hooks.values()))


def _text_of(value: Any) -> Any:
    """Returns what tells a value from others; for a function its code and what that refers to."""
    code = getattr(value, "__code__", None)
    if code is None:
        return repr(value)
    cells = [cell.cell_contents for cell in getattr(value, "__closure__", None) or ()]
    return code, *(repr(one) for one in (*cells, getattr(value, "__defaults__", None)) if not isinstance(one, Tensor))


def _randomise(model: nn.Module) -> None:
    """Set all parameters to random values of a usual size, so that no path through the model is closed."""
    seed_with(0)
    with torch.no_grad():
        for p in model.parameters():
            if not p.is_floating_point():
                continue
            values = torch.randn(p.shape, dtype=torch.float32)
            fan = max(1, p.numel() // max(1, p.shape[0])) if p.dim() > 1 else 0
            p.copy_(values / math.sqrt(fan) if fan else 0.5 + 0.2 * values)


def _try_together(wrapped: Any, args: Any, kwargs: Any, records: int) -> None:
    """Check that a record's output stays what it is beside other records.

    These are as large as itself, much smaller and much larger, and few or many: what is taken of a batch, such as its
    maximum, or only of a large one, shows in one of these cases.
    """
    wrapped.disable_hooks()
    for rows in _SIZES:
        outputs: list[list[Tensor]] = []
        for scale in _SCALES_TRIED if rows == _SIZES[0] else (1.0, 1.0):
            drawn = torch.Generator().manual_seed(len(outputs) + 1)
            arguments = (synthetic(args, records, drawn, rows), synthetic(kwargs, records, drawn, rows))
            own = torch.Generator().manual_seed(0)
            first = (synthetic(args, records, own, rows), synthetic(kwargs, records, own, rows))
            for value, mine in zip(tensors_in(arguments), tensors_in(first), strict=True):
                if value.is_floating_point():
                    value.mul_(scale)
                if value.dim() and value.shape[0] == rows:
                    value[0] = mine[0]
                else:
                    value.copy_(mine)
            try:
                with torch.no_grad():
                    outputs.append([out.reshape(rows, -1)[0] for out in _outputs(_run(wrapped, arguments), rows)])
            except Exception:  # not made for such input: nothing is known
                outputs.append([])
        known = [one for one in outputs if one]
        for other in known[1:]:
            for mine, beside in zip(known[0], other, strict=False):
                if mine.shape != beside.shape or not bool(mine.isfinite().all() and beside.isfinite().all()):
                    continue
                if _apart(mine, beside):
                    wrapped.enable_hooks()
                    raise Unfit(
                        "The model mixes records: a record's output depends on the other records of its batch, so one "
                        "record would move the gradients of all. Use layers and a forward() that take each record by "
                        "itself."
                    )
    wrapped.enable_hooks()


def _try_gradients(wrapped: Any, args: Any, kwargs: Any, records: int) -> None:
    """Check that Opacus' gradients of single records are those of the model."""
    drawn = torch.Generator().manual_seed(1)
    arguments = (synthetic(args, records, drawn), synthetic(kwargs, records, drawn))
    try:
        expected, found = _gradients(wrapped, arguments)
    except Misuse as error:
        raise Unfit(str(error)) from None
    except Exception as error:
        told = misuse_in(error)
        if told:
            raise Unfit(told) from None
        return
    for true, sampled in zip(expected, found, strict=True):
        if bool(true.isfinite().all() and sampled.isfinite().all()) and _apart(true, sampled):
            raise Unfit(
                "Gradients of single records are not those of the model: a weight is used past its layer, as by "
                "F.linear(x, layer.weight), or a layer is none that Opacus can take apart. Call the layers themselves."
            )


def _run(wrapped: Any, arguments: Any) -> Any:
    seed_with(2)
    args, kwargs = arguments
    return wrapped(*args, **kwargs)


def _gradients(wrapped: Any, arguments: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Returns each record's gradient, or its norm, by plain PyTorch and by Opacus."""
    outputs = _outputs(_run(wrapped, arguments))
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    losses = sum((out.reshape(3, -1) * (1 + out.reshape(3, -1))).sum(1) for out in outputs if out.requires_grad)
    if not isinstance(losses, Tensor):
        return [], []
    wrapped.disable_hooks()
    expected = []
    for loss in losses:
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        expected.append(_flat(parameters, grads))
    wrapped.enable_hooks()
    mark(losses.sum()).backward()  # type: ignore[no-untyped-call]
    if isinstance(wrapped, GhostModule):
        norms = [p._norm_sample for p in parameters if getattr(p, "_norm_sample", None) is not None]
        lengths = torch.stack([norm.double().square() for norm in norms]).sum(0).sqrt()
        return [one.norm().double() for one in expected], list(lengths)
    found = []
    for row in range(3):
        samples = [getattr(p, "grad_sample", None) for p in parameters]
        found.append(_flat(parameters, [None if sample is None else sample[row] for sample in samples]))
    return expected, found


def _flat(parameters: list[Any], grads: Sequence[Any]) -> Tensor:
    values = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
    return torch.cat([value.flatten() for value in values])


def _outputs(value: Any, rows: int = 3) -> list[Tensor]:
    """Returns the tensors of what a model returned that have records along their first axis."""
    return [one for one in tensors_in(value) if one.is_floating_point() and one.dim() and not one.shape[0] % rows]


def _apart(one: Tensor, other: Tensor) -> bool:
    scale = max(float(one.norm()), float(other.norm()))
    return float((one - other).norm()) > _TOLERANCE * scale


#: What Opacus and PyTorch say of a model's or a loop's structure -> what the server is told.
_SAID = {
    "Poisson sampling is not compatible with grad accumulation": (
        "A batch has several backward passes: each batch of batches() has one, whole, and then one step. Choose a "
        "smaller sample_rate if a batch needs too much memory."
    ),
    "Parameter tying is not supported": (
        "A layer is used twice in a step, or two layers share a weight, which ghost clipping cannot clip: use "
        "grad_sample_mode='hooks'."
    ),
    "Trying to add hooks twice": (
        "The model has been made private already: give private_training the plain model, and use no PrivacyEngine "
        "beside it."
    ),
    "is a view and is being modified inplace": (
        "A layer changes its input in place, which gradients of single records do not allow: say inplace=False."
    ),
    "modified by an inplace operation": (
        "A layer changes its input in place, which gradients of single records do not allow: say inplace=False."
    ),
    "Error(s) in loading state_dict": (
        "The message's arrays do not fit the model: names or shapes differ. Build the same model on server and node."
    ),
}


def misuse_in(error: BaseException) -> str:
    """Returns the sentence for an exception that tells of the structure of a model or loop; empty for any other."""
    text = str(error)
    return next((sentence for said, sentence in _SAID.items() if said in text), "")
