"""What the operators share: the library, checks of what they are handed, vmap, and autograd.

Whatever is registered here computes in full precision under autocast, runs on every device, and is
opaque to torch.compile.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._functorch.autograd_function import WrappedCtx
from torch.autograd import forward_ad

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LIBRARY = torch.library.Library("comhe_ext", "DEF")


class Form(NamedTuple):
    """All that the checks ask of a tensor: a key of caches where no size is symbolic."""

    shape: Sequence[int]
    dtype: torch.dtype
    device: torch.device
    layout: torch.layout


def form_of(x: Tensor) -> Form:
    """Take from a tensor what the checks ask of it."""
    return Form(x.shape, x.dtype, x.device, x.layout)


def compute_dtype(*tensors: Tensor | Form | None) -> torch.dtype:
    """float32, or float64 if one of the tensors is."""
    doubles = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if doubles else torch.float32


def no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Autocast would lower the products to half precision, and the energy with them."""
    # a meta tensor's device has no autocast to ask for
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def define(
    schema: str, *, composite: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the implementation of an operator on every device.

    composite: it is made of torch's own operators, which also give it shapes and derivatives.
    """
    name = schema.partition("(")[0]
    tags = [torch.Tag.pt2_compliant_tag]
    if not composite:
        # torch.compile leaves it out of its CUDA graphs: the portable tiles wait for the GPU, and
        # Triton's kernels are checked at their first call. PyTorch before 2.8 cannot be told so
        tags += [tag] if (tag := getattr(torch.Tag, "cudagraph_unsafe", None)) else []
    LIBRARY.define(schema, tags=tags)

    def register(implementation: Callable[..., Any]) -> Callable[..., Any]:
        def full_precision(*args: Any) -> Any:
            first = args[0][:1] if isinstance(args[0], Sequence) else args[:1]
            with no_autocast(first[0].device.type if first else "cpu"):
                return implementation(*args)

        untraced = _disable_dynamo(full_precision)

        def kernel(*args: Any) -> Any:
            # after a trace has ended Dynamo tries every frame that runs, but a kernel is no frame
            # for it; it is not told so where it is not used, for its import takes seconds
            call = untraced if "torch._dynamo" in sys.modules else full_precision
            return call(*args)

        if composite:
            LIBRARY.impl(name, implementation, "CompositeImplicitAutograd")
        else:
            LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        return implementation

    return register


# What an operator is handed may come from anywhere: it is checked before any kernel, and by the
# shape functions too, so that a compiler's trace fails where the eager call fails.


def check_rows(name: str, rows: Tensor | Form, dims: Sequence[int]) -> None:
    """Refuse what is no dense floating-point tensor of so many dimensions."""
    if rows.dtype not in DTYPES:
        raise TypeError(f"`{name}` must be float16, bfloat16, float32 or float64, got {rows.dtype}")
    if rows.layout != torch.strided:
        raise TypeError(f"`{name}` must be a dense tensor, got layout {rows.layout}")
    shape = rows.shape
    if len(shape) not in dims:
        expected = " or ".join(f"{dim}-D" for dim in dims)
        raise ValueError(f"`{name}` must be {expected}, got shape {tuple(shape)}")
    if shape[-1] == 0:
        raise ValueError(f"`{name}` must have at least one column, got shape {tuple(shape)}")


def check_like(name: str, rows: Tensor, other: str, like: Tensor) -> None:
    """Refuse rows of another shape or device than those they belong to."""
    check_rows(name, rows, (like.dim(),))
    if rows.shape != like.shape:
        raise ValueError(
            f"`{name}` must have the shape of `{other}`, got {tuple(rows.shape)} and "
            f"{tuple(like.shape)}"
        )
    check_device(name, rows, other, like)


def check_device(name: str, tensor: Tensor | Form, other: str, like: Tensor | Form) -> None:
    """Refuse a tensor on another device than the one that it belongs to."""
    if tensor.device != like.device:
        raise ValueError(
            f"`{name}` must be on the device of `{other}`, got {tensor.device} and {like.device}"
        )


# --- vmap: the batch becomes more sets of the same launch -----------------------------------------


def in_front(x: Tensor, dim: int | None, batch: int) -> Tensor:
    """Move the batch dimension to the front."""
    return x.unsqueeze(0).expand(batch, *x.shape) if dim is None else x.movedim(dim, 0)


def over_batch(
    call: Callable[..., Any], info: Any, in_dims: Sequence[Any], tensors: Sequence[Any], *rest: Any
) -> tuple[Any, Any]:
    """Return what a batching rule has to, by one call on the sets of all elements of the batch."""
    batch = info.batch_size
    flat = []
    for x, dim in zip(tensors, in_dims, strict=False):
        if x is not None:
            x = in_front(x, dim, batch)
            x = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
        flat.append(x)
    results = call(*flat, *rest)
    if isinstance(results, Tensor):
        return split_batch(results, batch), 0
    return tuple(split_batch(x, batch) for x in results), (0,) * len(results)


def split_batch(x: Tensor, batch: int) -> Tensor:
    """Give the elements of a batch, one after another, a dimension of their own."""
    return x.view(batch, x.shape[0] // batch, *x.shape[1:])


def register_vmap(name: str, num_tensors: int) -> None:
    """Batching rule of an operator on some tensors of many sets, with the same of all else."""
    op = getattr(torch.ops.comhe_ext, name).default

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        return over_batch(op, info, in_dims, args[:num_tensors], *args[num_tensors:])

    torch.library.register_vmap(f"comhe_ext::{name}", rule, lib=LIBRARY)


# --- autograd -------------------------------------------------------------------------------------


def forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is open, so that any tensor may be dual."""
    return forward_ad._current_level >= 0


def under_vmap() -> bool:
    """Whether a vmap is running: its tensors do not tell whether they are being differentiated."""
    if not torch._C._are_functorch_transforms_active():
        return False
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


def leave_trace() -> None:
    """End a trace of torch.compile: it would lose what follows, and the result a derivative."""


# constants to torch.compile, which makes a new trace where they change
forward_mode._dynamo_marked_constant = True  # type: ignore[attr-defined]
under_vmap._dynamo_marked_constant = True  # type: ignore[attr-defined]
# all that torch.compiler.disable does here, but that imports Dynamo and with it Triton
leave_trace._torchdynamo_disable = True  # type: ignore[attr-defined]
leave_trace._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
    "comhe_ext: not in a trace are forward mode, and vmap where gradients may be asked for"
)


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether somebody may ask for a derivative in one of the tensors, in reverse mode."""
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            return True
    if under_vmap():
        leave_trace()
        return True
    return False


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """function.apply(*args), without the signature that torch reads and binds at every call.

    That takes longer than all else that a short call does outside of its kernel.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    args = torch._functorch.utils.unwrap_dead_wrappers(args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def allow_missing_gradients(ctx: Any) -> None:
    """Let a backward see None where no gradient comes, instead of zeros.

    Not in a vmap rule that torch generates: before PyTorch 2.8 such a backward fails at None.
    """
    ctx.set_materialize_grads(isinstance(ctx, WrappedCtx))


def differentiable_jvp(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """Let the jvp of a Function, called as jvp(ctx, *saved, *tangents), be differentiated again.

    Around a jvp torch turns forward mode off, for the levels of torch.func further out too: their
    derivative of it would be zero. Instead the saved tensors lose the tangents of this level.
    Under vmap they could not, so such a Function has a vmap rule of its own, without a batch in it.
    """

    @wraps(jvp)
    def within_outer_levels(ctx: Any, *tangents: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            saved = [
                x if x is None else forward_ad.unpack_dual(x).primal for x in ctx.saved_tensors
            ]
            return jvp(ctx, *saved, *tangents)

    return within_outer_levels


class _Product(torch.autograd.Function):
    """left @ right, [..., n, m], and all its derivatives, whatever autocast says."""

    @staticmethod
    def forward(left: Tensor, right: Tensor) -> Tensor:
        with no_autocast(left.device.type):
            return left @ right

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if grad is None:
            return None, None
        left, right = ctx.saved_tensors
        to_left, to_right = ctx.needs_input_grad
        return (
            _Product.apply(grad, right.mT) if to_left else None,
            _Product.apply(left.mT, grad) if to_right else None,
        )

    @staticmethod
    @differentiable_jvp
    def jvp(
        ctx: Any, left: Tensor, right: Tensor, to_left: Tensor | None, to_right: Tensor | None
    ) -> Tensor:
        if to_left is None:
            return _Product.apply(left, to_right)
        if to_right is None:
            return _Product.apply(to_left, right)
        return _Product.apply(to_left, right) + _Product.apply(left, to_right)

    @staticmethod
    def vmap(
        info: Any, in_dims: Sequence[int | None], left: Tensor, right: Tensor
    ) -> tuple[Tensor, int]:
        left, right = (
            in_front(x, dim, info.batch_size) for x, dim in zip((left, right), in_dims, strict=True)
        )
        return _Product.apply(left, right), 0


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of two matrices, which autocast lowers in none of its derivatives."""
    # compiled derivatives are traced while autocast is off, and Dynamo refuses a jvp
    if torch.compiler.is_compiling() or not torch.is_autocast_enabled(left.device.type):
        return left @ right
    return _Product.apply(left, right)


class _Final(torch.autograd.Function):
    """The identity; any derivative raises, and only if it is really on the way to a result."""

    generate_vmap_rule = True

    @staticmethod
    def forward(points: Tensor, what: str) -> Tensor:
        return points.view_as(points)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.what = inputs[1]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            f"comhe_ext: the {ctx.what} is differentiable twice; "
            "third derivatives are not implemented"
        )

    jvp = backward


def final(points: Tensor, what: str) -> Tensor:
    """Mark the points of a second derivative, of which a third one raises.

    A second derivative is linear in its tangents, and a function of them may be differentiated
    (torch.autograd.functional.hvp does). What it is in the points must not come out as zero.
    """
    return _Final.apply(points, what)
