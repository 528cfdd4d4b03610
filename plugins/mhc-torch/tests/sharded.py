"""Several processes that compute what one does, and the collectives that they need for it.

``python plugins/mhc-torch/tests/sharded.py --processes 4`` runs every layout and prints a line for
each; docs/records has what it printed. tests/test_sharded.py asserts the same of two processes.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode

import mhc_core as mhc
from mhc_backends.kernels.ops import OF_PARTS
from mhc_conformance.cases import SMALL, Case, data, declaration
from mhc_conformance.telling import SECOND
from mhc_core.math import OPS
from mhc_core.selection import registered
from mhc_core.sharding import CHANNEL_OPS
from mhc_torch.distributed import ChannelParallel, TokenParallel, channels_over
from mhc_torch.nn import (
    GatedConnection,
    GatedHead,
    HyperConnectedBlock,
    HyperConnectedStack,
    HyperConnection,
    HyperHead,
)
from mhc_torch.ops import checkpoint

B, S, n, C, R = 4, 8, 4, 16, 3  # R is the rank of the gates
QUICK = mhc.DEEPSEEK_V4


class Found(NamedTuple):
    """The result of a layout: its largest relative error, and its collectives."""

    error: float
    forward: list[tuple[str, int]]
    backward: list[tuple[str, int]]


class Collectives(TorchDispatchMode):
    """Keep the name, and the bytes that it takes, of each collective inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if DTensor in types:
            return NotImplemented
        name = func.name().partition(".")[0]
        if "c10d" in func.namespace and not name.endswith(("wait_tensor", "_autograd")):
            self.seen.append((name.partition("::")[2].strip("_"), _bytes(args)))
        return func(*args, **(kwargs or {}))


class AllReduces:
    """Keep the bytes of each all-reduce inside the block; kernels run by formulas under a mode."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self._plain: Any = dist.all_reduce

    def __enter__(self) -> AllReduces:
        dist.all_reduce = self._counted
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_reduce = self._plain

    def _counted(self, array: Tensor, **options: Any) -> Any:
        self.seen.append(("allreduce", array.nbytes))
        return self._plain(array, **options)


def _bytes(arguments: Any) -> int:
    if isinstance(arguments, Tensor):
        return arguments.nbytes
    if isinstance(arguments, (list, tuple)):
        return sum(map(_bytes, arguments))
    return 0


def apart(got: Any, wanted: Tensor) -> float:
    """Return the largest distance, relative to the largest number."""
    got = got.full_tensor() if isinstance(got, DTensor) else got
    got, wanted = got.detach(), wanted.detach()
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))


# ---- ops -----------------------------------------------------------------------------------------


def one_op(
    op: str, layout: str, mesh: Any, backend: str = "torch", watch: Any = Collectives
) -> Found:
    """Compare an op on DTensors, by a backend, with the formulas on tensors."""
    statics = {case.op: case.options for case in SECOND}[op]
    case = Case(op, "sharded", SMALL._replace(leading=(B, S), C=C), tuple(statics.items()))
    arrays = [torch.from_numpy(one.copy()) for one in data(case, "float32", 0).primals]
    words = [some[0] for some in declaration(op).patterns.values()]
    generator = torch.Generator().manual_seed(1)

    def placement(array: Tensor, word: Sequence[str]) -> Any:
        if layout == "channels":
            return Shard(array.ndim - 1) if word[-1] == "C" else Replicate()
        dim = ("batch", "sequence").index(layout)
        return Shard(dim) if array.shape[:2] == (B, S) else Replicate()

    function = getattr(mhc, op)
    plain = [one.clone().requires_grad_() for one in arrays]
    wanted = function(*plain, **statics, backend="torch")
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    cotangents = [torch.randn(one.shape, generator=generator) for one in wanted if one is not None]
    there = [one for one in wanted if one is not None]
    gradients = torch.autograd.grad(there, plain, cotangents, allow_unused=True)

    parts = [
        distribute_tensor(one, mesh, [placement(one, word)]).requires_grad_()
        for one, word in zip(arrays, words, strict=False)
    ]
    with watch() as forward:
        made = function(*parts, **statics, backend=backend)
    made = [one for one in (made if isinstance(made, tuple) else (made,)) if one is not None]
    given = [
        distribute_tensor(one, mesh, list(out.placements))
        for one, out in zip(cotangents, made, strict=True)
    ]
    with watch() as backward:
        pulled = torch.autograd.grad(made, parts, given, allow_unused=True)
    pairs = [*zip(made, there, strict=True), *zip(pulled, gradients, strict=True)]
    errors = [apart(a, b) for a, b in pairs if b is not None]
    by_hand = mhc.vjp(op, parts, tuple(given), backend=backend, **statics)
    errors += [apart(a, b) for a, b in zip(by_hand, gradients, strict=True) if b is not None]
    return Found(max(errors), forward.seen, backward.seen)


FEW = ("combine_pre", "head", "rms_norm")
KERNELS = ("combine_pre",)


def some_ops(mesh: Any, ops: Sequence[str]) -> dict[str, Found]:
    """Return what ops do with sharded tokens, and where they take them, with sharded channels."""
    return {
        f"{op}, {layout}": one_op(op, layout, mesh)
        for op in ops
        for layout in ("batch", "sequence", "channels")
        if layout != "channels" or op in CHANNEL_OPS
    }


def by_kernels(mesh: Any, ops: Sequence[str] = KERNELS) -> dict[str, Any]:
    """Return what ops on parts of the channels do by torch-cuda's kernels, run on a CPU."""
    try:
        import on_cpu
    except pytest.skip.Exception as reason:
        return {"skipped": str(reason)}
    if on_cpu.needs_gcc.args[0]:
        return {"skipped": on_cpu.needs_gcc.kwargs["reason"]}
    with registered(on_cpu.SPEC):
        found: dict[str, Any] = {}
        for op in ops:
            before = on_cpu.DEVICE.launched
            found[op] = one_op(op, "channels", mesh, on_cpu.NAME, AllReduces)
            found[f"{op}, launched"] = on_cpu.DEVICE.launched - before
        found["plain"] = megatron(mesh, on_cpu.NAME, AllReduces)
    return found


# ---- models --------------------------------------------------------------------------------------
# In float64: layouts round float32 differently, and attention makes 2e-5 of it.


class Mlp(nn.Module):
    """Two products, with tanh between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(C, 2 * C, bias=False), nn.Linear(2 * C, C, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        """Return the layer's output."""
        return self.down(torch.tanh(self.up(h)))


class Attention(nn.Module):
    """One causal head: a token reads those before it, on other devices too."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(C, C, bias=False) for _ in range(3))
        self.mask: Tensor | DTensor = torch.ones(S, S).tril().log()

    def forward(self, h: Tensor) -> Tensor:
        """Return the layer's output."""
        k, v = self.k(h), self.v(h)
        if isinstance(k, DTensor) and isinstance(v, DTensor):  # keys and values of all tokens
            k, v = (one.redistribute(placements=[Replicate()]) for one in (k, v))
        scores = self.q(h) @ k.transpose(-2, -1) / C**0.5 + self.mask
        return scores.softmax(-1) @ v


def made(single_pass: bool = False, **options: Any) -> HyperConnectedStack:
    """Return the same stack in every process: attention, MLP, attention, MLP."""
    torch.manual_seed(0)
    layers = [Attention(), Mlp(), Attention(), Mlp()]
    blocks = [HyperConnectedBlock(layer, C, n, QUICK) for layer in layers]
    head = None if single_pass else HyperHead(C, n, QUICK)
    stack = HyperConnectedStack(blocks, n, single_pass, recompute=2, head=head, **options)
    for module in stack.modules():  # far from the start, where H_res has little gradient
        if isinstance(module, (HyperConnection, HyperHead)):
            for one in module.parameters():
                nn.init.normal_(one, std=0.1)
    return stack.double()


def hidden() -> Tensor:
    """Return the same input in every process."""
    return torch.randn(B, S, C, generator=torch.Generator().manual_seed(2)).double()


def loss_of(out: Tensor) -> Tensor:
    """Return a sum over tokens that no layout changes."""
    return (out.sin() * out).sum()


def alone(single_pass: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and the gradients of one process."""
    stack = made(single_pass)
    loss = loss_of(stack(hidden()))
    loss.backward()
    return loss.detach(), {name: some(one.grad) for name, one in stack.named_parameters()}


def some(value: Tensor | None) -> Tensor:
    """Return a gradient that must be there."""
    assert value is not None
    return value


def compared(
    stack: nn.Module,
    loss: Tensor,
    seen: tuple[Collectives, Collectives],
    wanted: tuple[Tensor, dict[str, Tensor]],
    names: Callable[[str], str] = str,
) -> Found:
    """Compare a loss, and the gradients that a stack has, with those of one process."""
    total, gradients = wanted
    got = {names(name): some(one.grad) for name, one in stack.named_parameters()}
    errors = [apart(loss.detach(), total), *(apart(got[k], gradients[k]) for k in got)]
    return Found(max(errors), seen[0].seen, seen[1].seen)


def sharded_channels(mesh: Any) -> Found:
    """Shard streams and phi along C, and the MLPs by columns and rows; a tensor-parallel model."""
    stack = made()
    mlps = {
        "up": ColwiseParallel(input_layouts=Shard(-1), use_local_output=False),
        "down": RowwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    for block in stack.blocks:
        if isinstance(block.layer, Mlp):
            parallelize_module(block.layer, mesh, mlps)
        else:
            block.layer.mask = distribute_tensor(block.layer.mask, mesh, [Replicate()])
    parallelize_module(stack, mesh, ChannelParallel(output_layouts=Replicate()))
    assert stack.blocks[0].connection.fn.to_local().numel() == 24 * n * C // mesh.size()
    with Collectives() as forward:
        loss = loss_of(stack(hidden()))
    with Collectives() as backward:
        loss.backward()
    return compared(stack, loss, (forward, backward), alone())


def sharded_gates(mesh: Any) -> Found:
    """Shard the channels of a gated residual, of its weights and of its head."""

    def made() -> nn.ModuleDict:
        torch.manual_seed(3)
        both = nn.ModuleDict({"connection": GatedConnection(C, n, R), "head": GatedHead(C, n, R)})
        for one in both.parameters():
            nn.init.normal_(one, std=0.3)
        return both.double()

    def run(both: nn.ModuleDict, x: Tensor) -> Tensor:
        return loss_of(both["head"](both["connection"](x, torch.tanh)))

    x = torch.randn(B, S, n, C, generator=torch.Generator().manual_seed(4)).double()
    whole, both = made(), made()
    total = run(whole, x)
    total.backward()
    wanted = {name: some(one.grad) for name, one in whole.named_parameters()}
    for one in both.values():
        parallelize_module(one, mesh, ChannelParallel(use_local_output=False))
    for name, one in both.named_parameters():
        assert cast("Any", one).to_local().numel() == wanted[name].numel() // mesh.size()
    with Collectives() as forward:
        loss = cast("DTensor", run(both, x)).full_tensor()
    with Collectives() as backward:
        loss.backward()
    return compared(both, loss, (forward, backward), (total.detach(), wanted))


def sharded_sequence(mesh: Any) -> Found:
    """Shard the sequence; attention gathers keys and values, as context parallelism does."""
    stack = made()
    for block in stack.blocks:
        if isinstance(block.layer, Attention):
            rows = distribute_tensor(block.layer.mask, mesh, [Shard(0)])
            block.layer.mask = rows
    style = TokenParallel(1, input_layouts=Replicate(), use_local_output=False)
    parallelize_module(stack, mesh, style)
    with Collectives() as forward:
        loss = loss_of(stack(hidden())).full_tensor()
    with Collectives() as backward:
        loss.backward()
    return compared(stack, loss, (forward, backward), alone())


def fsdp(mesh: Any) -> Found:
    """Shard the batch and the parameters by FSDP2, which takes the mean of the gradients."""
    stack = made()
    for block in stack.blocks:
        fully_shard(block.layer, mesh=mesh)
    fully_shard(stack, mesh=mesh)
    part = hidden().chunk(mesh.size())[mesh.get_local_rank()]
    with Collectives() as forward:
        loss = loss_of(stack(part)) * mesh.size()
    with Collectives() as backward:
        loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return compared(stack, mean / mesh.size(), (forward, backward), alone())


def ddp(mesh: Any) -> Found:
    """Shard the batch by DistributedDataParallel."""
    model = nn.parallel.DistributedDataParallel(made(), process_group=mesh.get_group())
    part = hidden().chunk(mesh.size())[mesh.get_local_rank()]
    with Collectives() as forward:
        loss = loss_of(model(part)) * mesh.size()
    with Collectives() as backward:
        loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    seen = forward, backward
    return compared(model, mean / mesh.size(), seen, alone(), lambda k: k.removeprefix("module."))


def pipeline(mesh: Any, single_pass: bool = False) -> Found:
    """Split the sublayers over processes; streams, and in the single pass H_pre, cross over."""
    whole, rank, size = made(single_pass), mesh.get_local_rank(), mesh.size()
    each = len(whole.blocks) // size
    last = rank == size - 1
    stage = HyperConnectedStack(
        list(whole.blocks[rank * each : (rank + 1) * each]),
        n,
        single_pass,
        recompute=1,
        head=whole.head if last else None,
        first=rank == 0,
        last=last,
    )
    schedule = ScheduleGPipe(
        PipelineStage(stage, rank, size, torch.device("cpu")),
        n_microbatches=2,
        loss_fn=lambda out, _: loss_of(out),
        scale_grads=False,
    )
    losses: list[Tensor] = []
    with Collectives() as seen:
        if rank == 0:
            schedule.step(hidden())
        elif last:
            schedule.step(target=torch.zeros(B), losses=losses)
        else:
            schedule.step()
    total = torch.stack(losses).sum().detach() if last else torch.zeros((), dtype=torch.float64)
    dist.broadcast(total, size - 1)

    def name_of(name: str) -> str:
        if not name.startswith("blocks."):
            return name
        _, k, rest = name.split(".", 2)
        return f"blocks.{int(k) + rank * each}.{rest}"

    return compared(stage, total, (seen, Collectives()), alone(single_pass), name_of)


def megatron(mesh: Any, backend: str = "torch", watch: Any = Collectives) -> Found:
    """Shard channels of plain tensors, in Megatron's layout [s, b, n C], which is a view."""
    rank, size = mesh.get_local_rank(), mesh.size()
    part = slice(rank * C // size, (rank + 1) * C // size)
    torch.manual_seed(0)
    x, phi = torch.randn(S, B, n * C), torch.randn(24, n * C) / 8
    scale, bias = torch.ones(3), torch.randn(24)
    plain = [one.clone().requires_grad_() for one in (x, phi, scale, bias)]

    def run(x: Tensor, *projection: Tensor) -> Tensor:
        streams = x.unflatten(-1, (n, -1))
        assert streams.data_ptr() == x.data_ptr()
        h, h_post, h_res = mhc.pre(streams, *projection, QUICK)
        return mhc.combine(streams, torch.tanh(h), h_post, h_res)

    out = run(*plain)
    loss_of(out).backward()
    own = [
        one.unflatten(-1, (n, C))[..., part].flatten(-2) if one.shape[-1] == n * C else one
        for one in (x, phi, scale, bias)
    ]
    own = [one.detach().clone().requires_grad_() for one in own]
    with watch() as forward, channels_over(mesh.get_group()), mhc.use_backend(backend):
        mine = run(*own)
    with watch() as backward:
        loss_of(mine).backward()
    errors = [apart(mine, out[..., part])]
    for one, wanted in zip(own, (some(p.grad) for p in plain), strict=True):
        if wanted.shape[-1] == n * C:
            wanted = wanted.unflatten(-1, (n, C))[..., part].flatten(-2)
        errors.append(apart(some(one.grad), wanted))
    return Found(max(errors), forward.seen, backward.seen)


def recomputed(mesh: Any) -> Found:
    """Recompute a sublayer on parts of the channels in a backward after the block has ended."""
    rank, size = mesh.get_local_rank(), mesh.size()
    part = slice(rank * C // size, (rank + 1) * C // size)
    torch.manual_seed(0)
    x, phi = torch.randn(S, n, C).double(), torch.randn(24, n, C).double() / 8
    scale, bias = torch.ones(3).double(), torch.randn(24).double()

    def sublayer(x: Tensor, phi: Tensor, *rest: Tensor) -> Tensor:
        h, h_post, h_res = mhc.pre(x, phi.flatten(-2), *rest, QUICK)
        return mhc.combine(x, torch.tanh(h), h_post, h_res)

    def inside(*arrays: Tensor) -> Tensor:
        with channels_over(mesh.get_group()):
            return sublayer(*arrays)

    plain = [one.clone().requires_grad_() for one in (x, phi, scale, bias)]
    loss_of(sublayer(*plain)).backward()
    again = cast("Any", torch.utils.checkpoint.checkpoint)
    ways: tuple[tuple[Callable[..., Tensor], bool], ...] = (
        (checkpoint(sublayer), True),
        (lambda *arrays: again(inside, *arrays, use_reentrant=False), False),
        (lambda *arrays: again(inside, *arrays, use_reentrant=True), False),
    )
    errors: list[float] = []
    for run, block in ways:
        own = [one[..., part].clone() if one.ndim == 3 else one.clone() for one in (x, phi)]
        own = [one.requires_grad_() for one in (*own, scale.clone(), bias.clone())]
        with channels_over(mesh.get_group()) if block else contextlib.nullcontext():
            out = run(*own)
        loss_of(out).backward()
        for one, whole in zip(own, (some(p.grad) for p in plain), strict=True):
            wanted = whole[..., part] if whole.ndim == 3 else whole
            errors.append(apart(some(one.grad), wanted))
    return Found(max(errors), [], [])


class Adapted(nn.Linear):
    """A layer of another class, as adapters' and quantisers' are."""


def refusals(mesh: Any) -> dict[str, str]:
    """Return the errors of calls that do not fit."""
    x = torch.randn(4, n, C)
    weights = torch.ones(4, n)

    def said(function: Callable[..., Any], *arrays: Any, **options: Any) -> str:
        try:
            function(*arrays, **options)
        except (TypeError, ValueError, RuntimeError) as error:
            return str(error)
        return "not refused"

    def twice() -> None:
        with channels_over(mesh.get_group()):
            own = x.clone().requires_grad_()
            torch.autograd.grad(mhc.aggregate(own, weights).sum(), own, create_graph=True)

    def through_vjp() -> None:
        own, given = x.clone().requires_grad_(), torch.ones(4, C)
        with channels_over(mesh.get_group()):
            pulled = mhc.vjp("aggregate", (own, weights), (given.requires_grad_(),))
        pulled[1].sum().backward()

    def through_vjp_of_dtensors() -> None:
        own = placed(x, 2).requires_grad_()
        pulled = mhc.vjp(
            "aggregate", (own, distribute_tensor(weights, mesh)), (placed(torch.ones(4, C), 1),)
        )
        pulled[1].sum().backward()

    def recomputed_outside() -> None:
        own, again = x.clone().requires_grad_(), cast("Any", torch.utils.checkpoint.checkpoint)
        with channels_over(mesh.get_group()):
            out = again(mhc.rms_norm, own, torch.ones(C), use_reentrant=False)
        out.sum().backward()

    def mapped() -> None:
        with channels_over(mesh.get_group()):
            torch.vmap(lambda x: mhc.rms_norm(x, torch.ones(C)))(x)

    def compiled() -> None:
        run = torch.compile(mhc.rms_norm, backend="eager", fullgraph=True)
        with channels_over(mesh.get_group()):
            run(x, torch.ones(C))

    def inside(function: Callable[..., Any], *arrays: Any) -> None:
        with channels_over(mesh.get_group()):
            function(*arrays)

    def placed(array: Tensor, dim: int) -> DTensor:
        return distribute_tensor(array, mesh, [Shard(dim)])

    adapted = GatedHead(C, n, R)
    adapted.input_mix_weight_down = cast("Any", Adapted(n * C, R, bias=False))

    return {
        "plain": said(mhc.aggregate, placed(x, 0), weights),
        "streams": said(mhc.aggregate, placed(x, 1), distribute_tensor(weights, mesh)),
        "adapted": said(lambda: parallelize_module(adapted, mesh, ChannelParallel())),
        "odd": said(mhc.contract, placed(torch.randn(4, n, C + 1), 2)),
        "op": said(
            mhc.pre_scale, placed(torch.randn(4, n * C), 1), distribute_tensor(weights, mesh)
        ),
        "plain op": said(inside, mhc.pre_scale, torch.randn(4, n * C), weights),
        "numpy": said(inside, mhc.aggregate, x.numpy(), weights.numpy()),
        "twice": said(twice),
        "twice, vjp": said(through_vjp),
        "twice, vjp of DTensors": said(through_vjp_of_dtensors),
        "recomputed outside": said(recomputed_outside),
        "vmap": said(mapped),
        "compile": said(compiled),
    }


def both_at_once(mesh: Any) -> Found:
    """Shard the batch by FSDP2 over one dimension of a mesh, and channels over the other."""
    grid = init_device_mesh("cpu", (2, mesh.size() // 2), mesh_dim_names=("data", "channels"))
    stack = made()
    for block in stack.blocks:
        if isinstance(block.layer, Attention):
            rows = distribute_tensor(block.layer.mask, grid["channels"], [Replicate()])
            block.layer.mask = rows
    parallelize_module(stack, grid["channels"], ChannelParallel(output_layouts=Replicate()))
    fully_shard(stack, mesh=grid["data"])
    part = hidden().chunk(2)[grid["data"].get_local_rank()]
    with Collectives() as forward:
        loss = loss_of(stack(part)) * 2
    with Collectives() as backward:
        loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean, group=grid["data"].get_group())
    return compared(stack, mean / 2, (forward, backward), alone())


LAYOUTS: dict[str, Callable[[Any], Found]] = {
    "data (DDP)": ddp,
    "data (FSDP2)": fsdp,
    "sequence, context": sharded_sequence,
    "channels, tensor": sharded_channels,
    "channels, gated": sharded_gates,
    "channels, [s, b, n C]": megatron,
    "channels, recomputed": recomputed,
    "pipeline": pipeline,
    "pipeline, single pass": lambda mesh: pipeline(mesh, single_pass=True),
}


def run(rank: int, size: int, folder: str, every: bool = True) -> dict[str, Any]:
    """Run every layout as one of ``size`` processes, or a few, and return what was found."""
    torch.set_num_threads(1)
    limit = timedelta(seconds=120)  # for a process whose peer has failed
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, rank=rank, world_size=size, timeout=limit)
    try:
        mesh = init_device_mesh("cpu", (size,))
        layouts = LAYOUTS if every else {k: LAYOUTS[k] for k in LAYOUTS if k != "pipeline"}
        found: dict[str, Any] = {name: layout(mesh) for name, layout in layouts.items()}
        if size > 2:
            found["data (FSDP2) x channels"] = both_at_once(mesh)
        found["refused"] = refusals(mesh)
        found["ops"] = some_ops(mesh, OPS if every else FEW)
        found["kernels"] = by_kernels(mesh, OF_PARTS if every else KERNELS)
        return found
    finally:
        dist.destroy_process_group()


def run_and_leave(rank: int, size: int, folder: str, every: bool = True) -> None:
    """Run as another of ``size`` processes, and end this one; ``folder`` keeps what it prints.

    It ends without the interpreter's finalisation, in which a thread of gloo that drops its last
    tensor takes the lock and aborts the process, now and then (pytorch/pytorch#190489).
    """
    with Path(folder, f"{rank}.txt").open("w") as printed:
        os.dup2(printed.fileno(), 2)
    faulthandler.enable(2)
    try:
        run(rank, size, folder, every)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def printed_by_others(folder: str) -> str:
    """Return what the other processes printed, their crashes' traces too."""
    return "\n".join(file.read_text() for file in sorted(Path(folder).glob("*.txt")))


def listed(some: Sequence[tuple[str, int]]) -> str:
    """Return collectives in words, equal ones counted."""
    counts = {one: some.count(one) for one in some}
    return ", ".join(f"{count} x {kind} {size}" for (kind, size), count in counts.items()) or "none"


def main() -> None:
    """Print a line for each layout and op."""
    parser = argparse.ArgumentParser(description="Layouts over several processes, by gloo.")
    parser.add_argument("--processes", type=int, default=2)
    size = parser.parse_args().processes
    with tempfile.TemporaryDirectory() as folder:
        others: list[int] = []
        for rank in range(1, size):
            other = os.fork()  # nothing has run in parallel yet
            if other == 0:
                run_and_leave(rank, size, folder)
            others.append(other)
        found = run(0, size, folder)
        for other in others:
            assert os.waitpid(other, 0)[1] == 0, printed_by_others(folder)
    kinds = "float32 ops, float64 models"
    print(
        f"torch {torch.__version__}, {size} processes by gloo, [{B}, {S}, {n}, {C}], {kinds}; bytes"
    )
    found.pop("refused")
    kernels = {f"{k}, kernels": one for k, one in found.pop("kernels").items() if k in OF_PARTS}
    for name, one in {**kernels, **found.pop("ops"), **found}.items():
        lists = f"forward: {listed(one.forward)}; backward: {listed(one.backward)}"
        print(f"{name:34} error {one.error:.0e}; {lists}")


if __name__ == "__main__":
    main()
