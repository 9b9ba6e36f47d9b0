"""A pretended accelerator: tensors that say they are on `pretend:0` and compute on the CPU.

It holds code to the rules of a GPU, which tests on a CPU never meet:

- an operator refuses tensors of two devices, other than CPU tensors without dimensions and CPU indices;
- a tensor of the device has no `.numpy()`;
- a generator of the CPU cannot fill a tensor of the device;
- autocast follows CUDA's lists, so that bfloat16 meets float32 where it would on a GPU.

It also records the host's waits: operators that need values or shapes from the device before Python can go on. Copies
to the device are not counted; there are no streams and no pinned memory.

    with pretended() as waits:
        model.to(DEVICE)(batch.to(DEVICE))
    assert len(waits) == 3, waits

The backend is PyTorch's PrivateUse1, registered when this module is imported. Operators of tensors on it arrive in
`_run`, which calls them on the wrapped CPU tensors.
"""

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision  # noqa: F401  # registers the operators that get an autocast rule below
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

ROOT = Path(__file__).parent.parent
PROJECT = tuple(f"{ROOT / name}/" for name in ("ovd_models", "data_prep", "workflows"))
aten = torch.ops.aten


class _Backend(_DummyBackendModule):
    """What `torch.pretend` offers."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_setup_privateuseone_for_python_backend("pretend", backend_module=_Backend())
DEVICE = torch.device("pretend:0")


# -------------------------------------------------------------------------------------------------------- host waits


@dataclass(frozen=True)
class Wait:
    """One wait of the host for the device."""

    operator: str
    line: str
    """`file:line` of the project that caused it: of its packages, or of a test or benchmark if none of them ran."""


_RECORDS: list[list[Wait]] = []
"""The lists of the blocks of `pretended` that are open."""
BY_SHAPE = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
    aten.multinomial.default,  # checks its weights
    torch.ops.torchvision.nms.default,
}
"""Operators whose result has a shape that depends on values, or that check values."""
INDEXED = {aten.index.Tensor, aten._unsafe_index.Tensor}
CONVOLUTIONS = {aten.convolution.default, aten.convolution_backward.default}
PUT = {aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default, aten._unsafe_index_put.default}


def _waits(operator: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    if operator in BY_SHAPE or operator is aten._local_scalar_dense.default:
        return True
    if operator is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    if operator in INDEXED | PUT:
        masked = any(entry is not None and entry.dtype in (torch.bool, torch.uint8) for entry in args[1])
        return masked and not (operator in PUT and args[2].numel() == 1)  # that is `masked_fill`
    return False


def _record(operator: Any) -> None:
    stack = [entry for entry in traceback.extract_stack() if entry.filename != __file__]
    frames = [entry for entry in stack if entry.filename.startswith(PROJECT)]
    ours = (str(ROOT / "tests"), str(ROOT / "benchmarks"))  # a virtual environment may be below ROOT too
    frame = (frames or [entry for entry in stack if entry.filename.startswith(ours)] or stack)[-1]
    wait = Wait(str(operator), f"{frame.filename.removeprefix(f'{ROOT}/')}:{frame.lineno}")
    for record in _RECORDS:
        record.append(wait)


# ----------------------------------------------------------------------------------------------------- device tensors


class DeviceTensor(Tensor):
    """A tensor of the device; `host` holds its values."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, host: Tensor) -> "DeviceTensor":
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=DEVICE,
        )
        made.host = host
        return made  # type: ignore[no-any-return]

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"DeviceTensor({self.host!r})"

    def __format__(self, format_spec: str) -> str:
        return format(self.item() if self.dim() == 0 else str(self), format_spec)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy, use Tensor.cpu() first")

    @classmethod
    def __torch_dispatch__(
        cls, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(operator, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Brings operators to `_run` that make a tensor of the device from none."""

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(operator, args, kwargs or {})


def _host(value: Any) -> Any:
    return value.host if isinstance(value, DeviceTensor) else value


def _on_device(value: Any) -> Any:
    return DeviceTensor(value) if isinstance(value, Tensor) and not isinstance(value, DeviceTensor) else value


def _run(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call an operator by the device's rules."""
    leaves = tree_leaves((args, kwargs))
    device = kwargs.get("device")
    here = any(isinstance(entry, DeviceTensor) for entry in leaves)
    wanted = here if device is None else torch.device(device).type == DEVICE.type
    if not here and not wanted:
        return operator(*args, **kwargs)
    if operator._can_decompose():  # composite operators arrive whole in inference mode
        with _Factories():
            return operator.decompose(*args, **kwargs)
    if operator is aten.copy_.default:
        return _copy(*args[:2])
    moves = operator is aten._to_copy.default
    if not moves:
        _check(operator, args, leaves)
    if _waits(operator, args, kwargs) or (moves and here and not wanted and not kwargs.get("non_blocking")):
        _record(operator)
    plain_args, plain = tree_map(_host, args), tree_map(_host, kwargs)
    if device is not None:
        plain = {**plain, "device": torch.device("cpu")}
        plain.pop("pin_memory", None)
    result = _convolve(operator, plain_args) if operator in CONVOLUTIONS else operator(*plain_args, **plain)
    if not wanted:
        return result
    if moves and result is args[0]:
        result = result.clone()
    with torch.inference_mode(False):  # a view of a weight is no inference tensor
        result = tree_map(_on_device, result)
    return return_and_correct_aliasing(operator, args, kwargs, result) if here else result


def _convolve(operator: Any, args: tuple[Any, ...]) -> Any:
    """In float32: in bfloat16, the CPU's gradient of a weight that touches padding alone is not finite."""
    half = args[0].dtype == torch.bfloat16
    wide = tree_map(lambda value: value.float() if half and isinstance(value, Tensor) else value, args)
    return tree_map(lambda value: value.to(args[0].dtype) if isinstance(value, Tensor) else value, operator(*wide))


def _check(operator: Any, args: tuple[Any, ...], leaves: list[Any]) -> None:
    """Refuse what a GPU refuses."""
    free = tree_leaves(args[1]) if operator in INDEXED | PUT else []
    for entry in leaves:
        stranger = isinstance(entry, Tensor) and not isinstance(entry, DeviceTensor) and entry.dim() > 0
        if stranger and not any(entry is index for index in free):
            raise RuntimeError(
                f"Expected all tensors to be on the same device: {operator} got cpu {tuple(entry.shape)} and {DEVICE}"
            )
        if isinstance(entry, torch.Generator) and entry.device.type != DEVICE.type:
            raise RuntimeError(f"Expected a '{DEVICE.type}' device type for generator but found '{entry.device.type}'")


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if isinstance(source, DeviceTensor) and not isinstance(target, DeviceTensor) and not non_blocking:
        _record(aten.copy_.default)
    with torch.no_grad():
        _host(target).copy_(_host(source))
    return target


# --------------------------------------------------------------------- kernels that C++ calls where no mode can see it

_ATEN = torch.library.Library("aten", "IMPL")
_VISION = torch.library.Library("torchvision", "IMPL")


def _operator(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def _empty(name: str) -> Callable[..., Tensor]:
    def make(*args: Any, **kwargs: Any) -> Tensor:
        kwargs = {**kwargs, "device": torch.device("cpu")}
        kwargs.pop("pin_memory", None)
        return DeviceTensor(_operator(name)(*args, **kwargs))

    return make


for _name in ("empty.memory_format", "empty_strided"):
    _ATEN.impl(_name, _empty(_name), "PrivateUse1")
_ATEN.impl("_copy_from", lambda source, target, non_blocking=False: _copy(target, source), "PrivateUse1")


# -------------------------------------------------------------------------------------------- CUDA's rules of autocast

Rule = Literal["lower", "float32", "promote"]
RULES: dict[Rule, str] = {
    "lower": """_convolution addbmm addmm addmv baddbmm bmm conv1d conv2d conv_transpose2d.input einsum linear matmul mm
        mv prelu scaled_dot_product_attention""",
    "float32": """acos asin binary_cross_entropy_with_logits cdist cosh cosine_similarity cumprod cumsum exp expm1
        group_norm kl_div l1_loss layer_norm log log1p log2 log_softmax.int mse_loss nll_loss norm.Scalar
        norm.ScalarOpt_dim pow.Scalar pow.Tensor_Scalar pow.Tensor_Tensor prod reciprocal renorm rsqrt sinh
        smooth_l1_loss softmax.int softplus sum sum.dim_IntList tan""",
    "promote": "addcdiv addcmul atan2 cat cross dot grid_sampler index_put scatter_add stack tensordot",
}
"""Operators of CUDA's lists that models use; all others keep the types of their inputs."""
_FALLBACK = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
_FALLBACK.fallback(torch.library.fallthrough_kernel)


def _outside_autocast() -> Any:
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1))


def _autocast(operator: Any, rule: Rule) -> Callable[..., Any]:
    def floats(value: Any) -> bool:
        return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64

    def call(*args: Any, **kwargs: Any) -> Any:
        wide = rule == "promote" and any(floats(v) and v.dtype == torch.float32 for v in tree_leaves((args, kwargs)))
        target = torch.float32 if wide or rule == "float32" else torch.bfloat16

        def cast(value: Any) -> Any:
            return value.to(target) if floats(value) else value

        with _outside_autocast():
            return operator(*tree_map(cast, args), **tree_map(cast, kwargs))

    return call


for _rule, _names in RULES.items():
    for _name in _names.split():
        _ATEN.impl(_name, _autocast(_operator(_name), _rule), "AutocastPrivateUse1")


def _roi_align(level: Tensor, boxes: Tensor, *rest: Any) -> Tensor:
    with _outside_autocast():
        return torch.ops.torchvision.roi_align(level.float(), boxes.float(), *rest).to(level.dtype)  # type: ignore[no-any-return]


def _nms(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
    with _outside_autocast():
        wide = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
        return torch.ops.torchvision.nms(wide, scores.to(wide.dtype), iou)  # type: ignore[no-any-return]


_VISION.impl("roi_align", _roi_align, "AutocastPrivateUse1")
_VISION.impl("nms", _nms, "AutocastPrivateUse1")


# ---------------------------------------------------------------------------------------------------------------- use


@contextmanager
def pretended(*, autocast: bool = False) -> Iterator[list[Wait]]:
    """A block in which the device exists; yields the list that its host waits are added to.

    With `autocast`, as in a training step, operators use bfloat16 by CUDA's lists.
    """
    record: list[Wait] = []
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter's `data` cannot change its device
    _RECORDS.append(record)
    try:
        with (
            _Factories(),
            torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast),
            torch.autograd.set_multithreading_enabled(False),  # a thread of the device would hide errors
        ):
            yield record
    finally:
        _RECORDS.pop()
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
