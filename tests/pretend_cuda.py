"""A pretended GPU: tensors that say they lie on cuda:0, compute on the CPU, and tell where a program waits.

    with pretended_gpu() as gpu:
        train.main(["--device=cuda"])
    gpu.waits, gpu.kernels        what the host would have waited for, in order; how often each kernel started

The idea: each operation comes by GPU.__torch_dispatch__. It refuses operands on two devices as CUDA does,
notes what the host must wait for, and has the CPU compute the numbers.

What it cannot see: which kernel a real GPU would choose, time, memory, torch.compile, nccl, `t.data = x`, and
queued copies whose source changes too early. C++ that asks for a tensor's device is told "meta"; only a build
for CUDA can go on with "cuda". So one kernel there (attention, norms, dropout) falls into its parts here.
"""

import collections
import contextlib
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

CUDA, Tensor = torch.device("cuda", 0), torch.Tensor
TOLD = torch.device("meta", 1)                   # which C++ repeats where it makes a tensor beside another
# the host must know their value or their size
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "bincount", "multinomial"}
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view"}


class OnGPU(Tensor):
    """A tensor on the pretended GPU; `host` is the CPU's tensor with its numbers."""

    @staticmethod
    def __new__(cls, host):
        empty = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device="meta")
        t = Tensor._make_subclass(cls, empty, dispatch_device=True, device_for_backend_keys=CUDA)
        t.host = host
        return t

    device, is_cuda, is_cpu, is_meta = (property(lambda self, v=v: v) for v in (CUDA, True, False, False))
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if any(map(foreign, types)):
            return NotImplemented
        raise RuntimeError(f"{func} of a tensor whose pretended GPU is gone")

    def data_ptr(self):                          # tells tied weights
        return self.host.data_ptr()

    def __reduce_ex__(self, protocol):           # torch.save; a real file would say "cuda:0"
        return self.detach().host.__reduce_ex__(protocol)


def foreign(kind):
    """Whether a class of tensors has operations of its own, as a matrix in four bits has."""
    return not issubclass(kind, OnGPU) and kind.__torch_dispatch__ is not Tensor.__torch_dispatch__


class GPU(TorchDispatchMode):
    """Computes, notes and refuses."""

    def __init__(self):
        super().__init__()
        self.waits, self.kernels = [], collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """The result of an operation; with it the one place where numbers change the device."""
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return TOLD
        tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        if any(foreign(type(t)) for t in tensors):
            return NotImplemented                # it comes apart into tensors, with which it comes again
        own = {id(t.host): t for t in tensors if isinstance(t, OnGPU)}       # which may be changed in place
        target = torch.device(kwargs["device"]) if kwargs.get("device") else None
        target = "cuda" if target == TOLD else target and target.type
        if not own and target != "cuda":
            return func(*args, **kwargs)
        self.note(func, args, kwargs, tensors, target)
        args, kwargs = tree_map_only(Tensor, lambda t: getattr(t, "host", t), (args, kwargs))
        result = func(*args, **kwargs | ({"device": "cpu"} if target else {}))
        if target == "cpu":
            return result
        return tree_map_only(Tensor, lambda t: own[id(t)] if id(t) in own else OnGPU(t), result)

    def note(self, func, args, kwargs, operands, target):
        """Count func, and note what the host waits for. RuntimeError if it mixes devices."""
        if func._opname in ("_to_copy", "copy_"):
            copied, to = args[func._opname == "copy_"], target or args[0].device.type
            queued = to == "cuda" and kwargs.get("non_blocking") and hasattr(copied, "pinned")
            if to != copied.device.type and not queued:
                self.waits.append(f"copy of {tuple(copied.shape)} to {to}")
            operands = []
        elif func._opname in ("index", "index_put", "index_put_"):
            self.waits += [f"index of {i.dtype} on {i.device.type}" for i in args[1] if i is not None
                           and (not isinstance(i, OnGPU) or i.dtype == torch.bool)]
            operands = [args[0], *args[2:3]]
        elif func._opname in WAITS:
            self.waits.append(func._opname)
        apart = [t for t in operands if not isinstance(t, OnGPU)
                 and not (t.dim() == 0 and torch.Tag.pointwise in func.tags)]
        if 0 < len(apart) < len(operands):
            raise RuntimeError(f"Expected all tensors to be on the same device: {func}, on the CPU {apart}")
        view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not view and func._opname not in NO_KERNEL:
            self.kernels[func._opname] += 1


class Generator(torch.Generator):
    """A random generator that says where it is."""
    def __new__(cls, device="cpu"):
        generator = super().__new__(cls)
        generator.on = torch.device(device).type
        return generator


class Python(TorchFunctionMode):
    """What C++ would ask CUDA before any operation."""

    def pinned(t):
        t = t.clone()
        t.pinned = True
        return t
    INSTEAD = {Tensor.pin_memory: pinned, Tensor.tolist: lambda t: t.detach().cpu().tolist()}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def numbered(x):                         # else CUDA would be asked which of its devices is meant
            return CUDA if isinstance(x, (str, torch.device)) and str(x) == "cuda" else x
        args, kwargs = [*map(numbered, args)], {key: numbered(x) for key, x in (kwargs or {}).items()}
        if generator := kwargs.get("generator"):
            place = args[0].device if isinstance(args[0], Tensor) else kwargs.get("device", "cpu")
            if generator.on != torch.device(place).type:
                raise RuntimeError(f"Expected a generator on the same device, {place}, not {generator.on}")
        return self.INSTEAD.get(func, func)(*args, **kwargs)


@contextlib.contextmanager
def pretended_gpu():
    """Inside this block torch finds one GPU; yields it."""
    with (mock.patch.multiple(torch.cuda, is_available=lambda: True, is_initialized=lambda: True,
                              get_device_name=lambda: "a pretended GPU"),
          mock.patch.object(torch, "Generator", Generator), Python(), GPU() as gpu):
        torch._C._set_only_lift_cpu_tensors(True)        # torch.tensor is made on the CPU, then copied
        try:
            yield gpu
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
