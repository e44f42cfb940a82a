"""CUDA graphs of the backbone: its kernels are launched as one.

A training step of T launches 1,477 kernels, for which a CPU takes longer than
a GPU for the work. Of batches of one kind the launches are recorded, once, and
replayed. ``torch.cuda.make_graphed_callables`` does the same for one kind; its
gradients are wrong where several backward passes add up to one update, because
those of the next pass take the place of what was accumulated.
"""
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from .fused import is_recorded, report

# Batches of a kind that run as ever before it is recorded. Libraries choose
# their kernels and Triton compiles its own in them, which cannot be recorded.
WARM_UP = 2


def _scan(module: nn.Module) -> tuple[list[int], list[bool], bool]:
    """Addresses of all tensors, what else a recording is bound to, and
    whether there are hooks, which a replay would not call."""
    addresses, flags, hooks = [], [], False
    for m in module.modules():
        flags.append(m.training)
        for p in m._parameters.values():
            if p is not None:
                addresses.append(p.data_ptr())
                flags.append(p.requires_grad)
        addresses += [
            b.data_ptr() for b in m._buffers.values() if b is not None
        ]
        hooks = hooks or bool(m._forward_hooks or m._forward_pre_hooks
                              or m._backward_hooks or m._backward_pre_hooks)
    return addresses, flags, hooks


def _autocast(x: Tensor) -> dict[str, Any]:
    device = x.device.type
    return dict(device_type=device, dtype=torch.get_autocast_dtype(device),
                enabled=torch.is_autocast_enabled(device))


class CUDAGraphs:
    """The graphs of a module, for a limited number of kinds of batches.

    A kind is a shape with a memory layout and a precision, and whether and
    for which parameters there are gradients. It is recorded at its third
    batch. Those beyond the limit, and modules with hooks, run as if there were
    no graphs. All graphs share their memory, so that what a forward pass has
    stored for its backward pass is gone once another one began.

    Args:
        limit (int): Greatest number of kinds.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.turn = limit, 0
        self._clear()

    def _clear(self) -> None:
        self.addresses: list[int] = []
        self.seen: Counter[Hashable] = Counter()
        self.recordings: dict[Hashable, _Recording] = {}
        self.memory: _Memory | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies, such as that of an EMA, have graphs of their own."""
        return dict(limit=self.limit)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    @staticmethod
    def can_record(x: Tensor) -> bool:
        """Whether that is a batch on a GPU, and is not being recorded."""
        return (x.is_cuda and not x.requires_grad
                and not torch.compiler.is_compiling()
                and not is_recorded(x))

    def recording(self, module: nn.Module, x: Tensor) -> '_Recording | None':
        """What stands in for ``module.forward(x)``, if anything does yet.

        Args:
            module (nn.Module): The module, always the same.
            x (Tensor): A batch.

        Returns:
            _Recording: To be called with x. None if the module has to run.
        """
        if not self.can_record(x):
            return None
        addresses, flags, hooks = _scan(module)
        if hooks:
            report('no CUDA graphs, because the backbone has hooks')
            return None
        if addresses != self.addresses:  # moved, or replaced
            self._clear()
            self.addresses = addresses
        kind = (x.shape, x.stride(), x.dtype, x.device, *flags,
                torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
                *_autocast(x).values())
        if kind not in self.recordings:
            if len(self.recordings) == self.limit:
                report(f'no more than {self.limit} CUDA graphs; images of '
                       'other shapes run without')
                return None
            self.seen[kind] += 1
            if self.seen[kind] <= WARM_UP:
                return None
            self.memory = self.memory or _Memory(x.device)
            self.recordings[kind] = _Recording(self, module, x)
            report(f'CUDA graph for images of shape {tuple(x.shape)}')
        return self.recordings[kind]


class _Memory:
    """What all graphs share: a pool, a stream, gradients of parameters."""

    def __init__(self, device: torch.device) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        self.grads: dict[str, Tensor] = {}

    @contextmanager
    def record(self) -> Iterator[torch.cuda.CUDAGraph]:
        graph = torch.cuda.CUDAGraph()
        # Other threads, which load the next batch or watch other processes,
        # may call CUDA meanwhile.
        with torch.cuda.graph(graph, self.pool, self.stream,
                              capture_error_mode='thread_local'):
            yield graph


class _Recording:
    """The graphs of one kind of batch.

    Args:
        owner (CUDAGraphs): Whose memory it uses.
        module (nn.Module): The module.
        x (Tensor): A batch of that kind.
    """

    def __init__(self, owner: CUDAGraphs, module: nn.Module,
                 x: Tensor) -> None:
        self.owner, memory = owner, owner.memory
        self.x = torch.empty_like(x)
        self.parameters = {
            name: p
            for name, p in module.named_parameters()
            if p.requires_grad and torch.is_grad_enabled()
        }
        # New leaves in the same memory. What autograd, or DDP, has tied to
        # the parameters belongs to other streams than the recording one.
        leaves = {
            name: p.detach().requires_grad_()
            for name, p in self.parameters.items()
        }
        with memory.record() as self.forward, torch.autocast(
                **_autocast(x), cache_enabled=False):
            outs = functional_call(module, leaves, (self.x, ))
        self.outs = [out.detach() for out in outs]
        # Those of frozen stages are not.
        self.differentiable = [out.requires_grad for out in outs]
        if leaves:
            outs = [out for out in outs if out.requires_grad]
            self.grad_outs = [torch.empty_like(out) for out in outs]
            self.grads = [
                memory.grads.setdefault(name, torch.empty_like(leaf))
                for name, leaf in leaves.items()
            ]
            with memory.record() as self.backward:
                torch._foreach_copy_(
                    self.grads,
                    torch.autograd.grad(outs, list(leaves.values()),
                                        self.grad_outs))

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """Replay the forward pass, and the backward pass in its time.

        Args:
            x (Tensor): A batch.

        Returns:
            tuple[Tensor]: What the module returns.
        """
        if self.parameters:
            return _Replay.apply(self, x, *self.parameters.values())
        return self.replay(x)

    def replay(self, x: Tensor) -> tuple[Tensor, ...]:
        """Replay the forward pass."""
        self.owner.turn += 1
        self.x.copy_(x)
        self.forward.replay()
        return tuple(out.clone() for out in self.outs)

    def replay_backward(self, turn: int, grads: tuple[Tensor, ...]
                        ) -> list[Tensor]:
        """Replay the backward pass of the forward pass with that number.

        Raises:
            RuntimeError: If what the forward pass had stored is gone.
        """
        if turn != self.owner.turn:
            raise RuntimeError(
                'the backbone has run another forward or backward pass since '
                'the forward pass of these gradients, and its CUDA graphs '
                'keep the activations of one: build it with cuda_graphs=False')
        self.owner.turn += 1
        grads = [g for g, d in zip(grads, self.differentiable) if d]
        torch._foreach_copy_(self.grad_outs, grads)
        self.backward.replay()
        # Copies, which may become the gradients of the parameters.
        copies = [torch.empty_like(grad) for grad in self.grads]
        torch._foreach_copy_(copies, self.grads)
        return copies


class _Replay(torch.autograd.Function):

    @staticmethod
    def forward(ctx: Any, recording: _Recording, x: Tensor,
                *parameters: Tensor) -> tuple[Tensor, ...]:
        outs = recording.replay(x)
        ctx.recording, ctx.turn = recording, recording.owner.turn
        ctx.mark_non_differentiable(*(
            out for out, differentiable in zip(outs, recording.differentiable)
            if not differentiable))
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.recording.replay_backward(ctx.turn, grads)
