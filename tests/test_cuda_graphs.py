"""The backbone in CUDA graphs, on a GPU and on a CPU that plays one.

The latter records the operators of torch and calls them again with the same
tensors, as a GPU does with its kernels.
"""
import contextlib
import copy
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from mmconv2former import (
    Conv2Former,
    cuda_graphs,
    dispatch,
    fuse_for_inference,
    products,
)

TINY = dict(depths=[1, 1], dims=[8, 16], kernel_size=5)
DEVICES = [
    'cpu',
    pytest.param('cuda', marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(),
                           reason='needs a GPU')])
]


class Tape(TorchDispatchMode):
    """A CUDA graph: what was called, to be called again."""

    def __init__(self):
        super().__init__()
        self.calls, self.overwritten = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.native_batch_norm.default:
            self.overwritten += [(t, t.clone()) for t in args[3:5]
                                 if t is not None]
        elif func is torch.ops.aten.lerp_.Scalar:  # running moments
            self.overwritten.append((args[0], args[0].clone()))
        elif func is torch.ops.aten.add_.Tensor \
                and args[0].dtype == torch.long:  # of batches
            self.overwritten.append((args[0], args[0].clone()))
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again)):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """Where a backbone is recorded."""
    if request.param == 'cuda':
        monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)
        return 'cuda'
    recording = []

    @contextlib.contextmanager
    def graph(tape, pool, stream, capture_error_mode):
        recording.append(tape)
        with tape:
            yield
        recording.pop()
        for tensor, value in tape.overwritten:  # a GPU would not run it
            tensor.data.copy_(value)

    monkeypatch.setattr(
        cuda_graphs.CUDAGraphs, 'can_record',
        staticmethod(lambda x: not recording and not x.requires_grad))
    monkeypatch.setattr(dispatch, 'is_capturing', lambda x: bool(recording))
    # A tape has the operators of torch and no others, on the fused path.
    monkeypatch.setattr(dispatch, '_cpp_obstacle', lambda: 'are not on tape')
    monkeypatch.setattr(dispatch, 'has_dispatch_mode', lambda: False)
    # The bits of MKL's products depend on where in memory the factors are.
    monkeypatch.setattr(products, '_mkl_is_fast', lambda: False)
    for name, value in dict(
            graph=graph, CUDAGraph=Tape, graph_pool_handle=lambda: None,
            Stream=lambda device: None,
            current_stream=lambda device: None).items():
        monkeypatch.setattr(torch.cuda, name, value)
    return 'cpu'


@pytest.fixture
def models(device):
    """Two backbones alike, one of which takes graphs."""

    def make(limit=True, **kwargs):
        torch.manual_seed(0)
        kwargs = dict(dict(arch=TINY, out_indices=(0, 1), out_norm=True,
                           layer_scale_init_value=1.), **kwargs)
        eager = Conv2Former(**kwargs).to(device)
        graphed = Conv2Former(**kwargs, cuda_graphs=limit).to(device)
        graphed.load_state_dict(eager.state_dict(), strict=True)
        return eager, graphed

    return make


def images(device, *size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(size or (2, 3, 32, 48)),
                       generator=generator).to(device)


def losses(model, x):
    outs = model(x)
    return outs, sum((out.float() * (i + 1)).pow(2).mean()
                     for i, out in enumerate(outs))


def step(model, x):
    """Outputs and all gradients of a training step."""
    model.zero_grad()
    outs, loss = losses(model, x)
    loss.backward()
    return [*outs, *(p.grad for p in model.parameters()), *model.buffers()]


def assert_same(one, other):
    for own, expected in zip(one, other, strict=True):
        if expected is None:
            assert own is None
        else:
            torch.testing.assert_close(own, expected, rtol=0, atol=0)


def recorded(model):
    return len(model.cuda_graphs.recordings)


@pytest.mark.parametrize('autocast', [None, torch.bfloat16])
def test_training_in_graphs_gives_the_same_bits(models, device, autocast):
    eager, graphed = models()
    optimizers = [
        torch.optim.SGD(model.parameters(), lr=0.1)
        for model in (eager, graphed)
    ]
    for seed in range(5):
        with torch.autocast(device, autocast, enabled=autocast is not None):
            assert_same(*(step(model, images(device, seed=seed))
                          for model in (graphed, eager)))
        for optimizer in optimizers:
            optimizer.step()
        assert recorded(graphed) == (seed >= cuda_graphs.WARM_UP)


def test_gradients_of_all_types_and_layouts_are_copied():
    shapes = (3, 2, 1, 1), (5, ), (4, 3, 3, 3)
    dtypes = torch.float32, torch.bfloat16, torch.float32
    grads = [torch.randn(s).to(d) for s, d in zip(shapes, dtypes)]
    grads[2] = grads[2].to(memory_format=torch.channels_last)
    flat = cuda_graphs._Gradients([torch.empty_like(g) for g in grads])
    flat.fill(grads)
    copies = flat.copies()
    flat.fill([torch.zeros_like(g) for g in grads])
    for own, grad in zip(copies, grads, strict=True):
        assert own.dtype == grad.dtype and own.is_contiguous()
        assert torch.equal(own, grad)


def test_gradients_of_several_batches_add_up(models, device):
    eager, graphed = models()
    for model in (eager, graphed):
        for _ in range(2):
            for seed in range(3):
                losses(model, images(device, seed=seed))[1].backward()
    assert recorded(graphed) == 1
    assert_same(*([p.grad for p in model.parameters()]
                  for model in (graphed, eager)))


def test_results_are_not_overwritten_by_the_next_batch(models, device):
    eager, graphed = models()
    eager.eval(), graphed.eval()
    with torch.no_grad():
        batches = [images(device, seed=seed) for seed in range(5)]
        results = [graphed(x) for x in batches]
        assert recorded(graphed) == 1
        for own, x in zip(results, batches):
            assert_same(own, eager(x))


def test_each_kind_of_batch_has_its_graph_up_to_the_limit(models, device):
    eager, graphed = models(limit=2)
    shapes = [(2, 3, 32, 48), (1, 3, 32, 48), (2, 3, 64, 32)]
    for seed in range(4):
        for shape in shapes:
            x = images(device, *shape, seed=seed)
            assert_same(step(graphed, x), step(eager, x))
    assert recorded(graphed) == 2


def test_graphs_share_the_memory_of_inputs_and_results(models, device):
    eager, graphed = models(limit=4)
    shapes = [(1, 3, 32, 32), (2, 3, 64, 96), (2, 3, 32, 48), (1, 3, 96, 32)]
    for shape in shapes:
        for seed in range(3):
            x = images(device, *shape, seed=seed)
            step(graphed, x), step(eager, x)
    assert recorded(graphed) == 4
    small, *others = graphed.cuda_graphs.recordings.values()
    for tensors in zip(*([r.x, *r.outs, *r.grad_outs] for r in others)):
        assert len(tensors) == 3
        assert len({t.data_ptr() for t in tensors}) == 1
    # It was there first, and could not hold the second one's.
    assert small.x.data_ptr() != others[0].x.data_ptr()
    for shape in [*shapes, *reversed(shapes)]:
        x = images(device, *shape, seed=3)
        assert_same(step(graphed, x), step(eager, x))


def test_memory_of_small_inputs_is_not_taken_for_larger_ones(models, device):
    eager, graphed = models(limit=2)
    for samples in (1, 2):
        x = images(device, samples, 3, 32, 32)
        for _ in range(4):
            assert_same(step(graphed, x), step(eager, x))
    assert recorded(graphed) == 2


@pytest.mark.parametrize('device', ['cpu'], indirect=True)
def test_memory_is_given_back_when_no_stream_uses_it(models, device,
                                                     monkeypatch):
    calls = []
    stream = SimpleNamespace(synchronize=lambda: calls.append(1))
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda _: stream)
    _, graphed = models()
    for _ in range(3):
        step(graphed, images(device))
    assert not calls
    graphed.stages[0][0].layer_scale_1 = nn.Parameter(torch.ones(8))
    step(graphed, images(device))
    assert calls == [1]


@pytest.mark.parametrize('device', ['cpu'], indirect=True)
def test_recording_waits_for_other_streams_that_use_the_memory(
        models, device, monkeypatch):
    waits, seen = [], []

    class Stream:
        def wait_stream(self, other):
            waits.append((self, other))

    def attempt(*args, original=cuda_graphs._Recording._run_once):
        seen.append([*waits])
        original(*args)

    monkeypatch.setattr(cuda_graphs._Recording, '_run_once', attempt)
    _, graphed = models()
    one, other = Stream(), Stream()
    for stream, batch in (one, 2), (other, 1):
        monkeypatch.setattr(torch.cuda, 'current_stream',
                            lambda _, stream=stream: stream)
        for _ in range(3):
            graphed(images(device, batch, 3, 32, 48))
    assert recorded(graphed) == 2
    assert seen == [[], [(other, one)]]


def test_modes_and_frozen_stages_have_graphs_of_their_own(models, device):
    eager, graphed = models(frozen_stages=1)
    x = images(device)
    for training in (True, False, True):
        eager.train(training), graphed.train(training)
        for _ in range(4):
            assert_same(step(graphed, x), step(eager, x))
            with torch.no_grad():
                assert_same(graphed(x), eager(x))
    assert recorded(graphed) == 4
    graphed.requires_grad_(False), eager.requires_grad_(False)
    for _ in range(4):
        outs = graphed(x)
        assert not any(out.requires_grad for out in outs)
        assert_same(outs, eager(x))
    assert recorded(graphed) == 5


def test_outputs_of_frozen_stages_want_no_gradients(models, device):
    eager, graphed = models(frozen_stages=1, out_norm=False)
    x = images(device)
    for _ in range(4):
        assert_same(step(graphed, x), step(eager, x))
    for model in (eager, graphed):
        assert [out.requires_grad for out in model(x)] == [False, True]


def test_new_weights_are_seen_wherever_they_come_from(models, device):
    eager, graphed = models()
    eager.eval(), graphed.eval()
    x = images(device)

    def check(records):
        with torch.no_grad():
            for _ in range(4):
                assert_same(graphed(x), eager(x))
        assert recorded(graphed) == records

    check(1)
    for model in (eager, graphed):  # in place
        model.load_state_dict(
            {k: v + 1 if v.is_floating_point() else v
             for k, v in model.state_dict().items()})
    check(1)
    for model in (eager, graphed):  # elsewhere
        for p in model.parameters():
            p.data = p.data * 2
    check(1)
    for model in (eager, graphed):
        model.stages[0][0].layer_scale_1 = torch.nn.Parameter(
            torch.ones(8, device=device))
    check(1)
    fuse_for_inference(eager), fuse_for_inference(graphed)
    check(1)
    for model in (eager, graphed):
        model.stages[0][0].fc1.weight.data.mul_(2.)
        model.stages[0][0].fc1.weight.mul_(2.)
    check(1)


def test_activations_that_are_gone_are_not_used(models, device):
    _, graphed = models()
    x = images(device)
    for _ in range(3):
        step(graphed, x)
    first, second = losses(graphed, x)[1], losses(graphed, x)[1]
    with pytest.raises(RuntimeError, match='cuda_graphs=False'):
        first.backward()
    second.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='cuda_graphs=False'):
        second.backward()


def test_activations_of_replaced_weights_are_not_used(models, device):
    _, graphed = models()
    x = images(device)
    for _ in range(3):
        step(graphed, x)
    _, loss = losses(graphed, x)
    norm = graphed.stages[0][0].mlp.norm
    norm.weight = nn.Parameter(norm.weight.detach().clone())
    with torch.no_grad():
        graphed(x)
    with pytest.raises(RuntimeError, match='cuda_graphs=False'):
        loss.backward()


def test_outputs_that_nobody_uses_give_no_gradients(models, device):
    eager, graphed = models()
    x = images(device)
    for i in (1, 0, 1, 0, 1, 0):
        for model in (eager, graphed):
            model.zero_grad()
            model(x)[i].pow(2).mean().backward()
        assert_same(*([p.grad for p in model.parameters()]
                      for model in (graphed, eager)))
    assert recorded(graphed) == 1
    assert graphed.norm1.weight.grad is None


def test_parameters_that_nobody_uses_have_no_gradients(models, device):
    eager, graphed = models()
    for model in (eager, graphed):
        model.extra = torch.nn.Parameter(torch.ones(2, device=device))
    x = images(device)
    for _ in range(4):
        assert_same(step(graphed, x), step(eager, x))
    assert recorded(graphed) == 1 and graphed.extra.grad is None


@pytest.mark.parametrize('layer, name, value, rate', [
    ('downsample_layers.0.2', 'momentum', 0., 0.),
    ('downsample_layers.0.2', 'track_running_stats', False, 0.),
    ('stages.1.0.drop_path', 'rate', 0., 0.9),
    ('stages.0.0.attn.att.1', 'approximate', 'tanh', 0.),
    ('stages.0.0.attn', 'fusion', 'sum', 0.),
    ('norm0', 'eps', .1, 0.),
    ('', 'out_norm', False, 0.),
    ('', 'out_indices', (1, ), 0.)])
def test_settings_of_layers_are_seen(layer, name, value, rate, models, device):
    eager, graphed = models(drop_path_rate=rate)
    x = images(device)
    for _ in range(4):
        step(eager, x), step(graphed, x)
    for model in (eager, graphed):
        module = model.get_submodule(layer)
        assert getattr(module, name) != value
        setattr(module, name, value)
    for _ in range(4):
        assert_same(step(graphed, x), step(eager, x))
    assert recorded(graphed) == 2


@pytest.mark.parametrize('name', ['stages.0.0', 'stages.0.0.attn.att.1'])
def test_replaced_modules_are_seen(name, models, device):
    """Also those without parameters, the first GELU."""
    eager, graphed = models()
    x = images(device)
    torch.manual_seed(1)
    other = Conv2Former(TINY, layer_scale_init_value=1.).to(device)
    other.stages[0][0].attn.att[1] = nn.ReLU()
    for _ in range(4):
        step(eager, x), step(graphed, x)
    for model in (eager, graphed):
        model.set_submodule(name, copy.deepcopy(other.get_submodule(name)))
    for _ in range(4):
        assert_same(step(graphed, x), step(eager, x))
    assert recorded(graphed) == 1


def test_weights_of_modules_that_a_layer_has_got_are_seen(models, device):
    eager, graphed = models()
    x = images(device)
    for _ in range(4):
        step(eager, x), step(graphed, x)
    for model in (eager, graphed):
        nn.utils.parametrizations.weight_norm(model.stages[1][0].mlp.fc1)
    for change in 1, 2:
        for model in (eager, graphed):
            norm = model.stages[1][0].mlp.fc1.parametrizations.weight
            norm.original1.data = norm.original1.data * change
        for _ in range(4):
            assert_same(step(graphed, x), step(eager, x))
        assert recorded(graphed) == 1


def test_buffers_elsewhere_are_seen(models, device):
    eager, graphed = models()
    eager.eval(), graphed.eval()
    x = images(device)
    with torch.no_grad():
        for _ in range(4):
            graphed(x)
        for model in (eager, graphed):
            norm = model.downsample_layers[0][2]
            norm.running_mean = norm.running_mean + 1
        for _ in range(4):
            assert_same(graphed(x), eager(x))
    assert recorded(graphed) == 1


def test_inference_mode_takes_the_graph_of_no_grad(models, device):
    """Recorded outside of it, so that what graphs share is not of it."""
    eager, graphed = models()
    eager.eval(), graphed.eval()
    x = images(device)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            for _ in range(4):
                outs = graphed(x)
                assert_same(outs, eager(x))
        assert {out.is_inference() for out in outs} == {
            mode is torch.inference_mode}
    assert recorded(graphed) == 1
    recording, = graphed.cuda_graphs.recordings.values()
    assert not any(t.is_inference() for t in (recording.x, *recording.outs))
    for _ in range(4):
        assert_same(step(graphed, x), step(eager, x))
    assert recorded(graphed) == 2


def test_models_made_in_inference_mode_are_recorded(models, device):
    with torch.inference_mode():
        eager, graphed = models()
        eager.eval(), graphed.eval()
        x = images(device)
        for _ in range(4):
            assert_same(graphed(x), eager(x))
    assert recorded(graphed) == 1


def test_sharded_weights_run_without_graphs(models, device):

    class FullyShardedDataParallel(nn.Sequential):
        """Another class of that name."""

    eager, graphed = models()
    x = images(device)
    graphed.stages[0] = FullyShardedDataParallel(*graphed.stages[0])
    for _ in range(4):
        assert_same(step(graphed, x), step(eager, x))
    assert recorded(graphed) == 0


def test_recording_that_failed_is_tried_again(models, device, monkeypatch):
    eager, graphed = models()
    x = images(device)

    def fail(*_):
        raise RuntimeError('no memory')

    for _ in range(cuda_graphs.WARM_UP):
        step(graphed, x), step(eager, x)
    with monkeypatch.context() as context:
        context.setattr(cuda_graphs._Recording, '_record', fail)
        with pytest.raises(RuntimeError, match='cuda_graphs=False'):
            graphed(x)
        # CUDA takes no second graph into a pool that has lost its only one.
        assert graphed.cuda_graphs.memory is None
    for _ in range(2):
        assert_same(step(graphed, x), step(eager, x))
    assert recorded(graphed) == 1


@pytest.mark.parametrize('device', ['cpu'], indirect=True)
def test_recording_that_failed_leaves_its_stream(models, device, monkeypatch):
    steps = []

    @contextlib.contextmanager
    def stream(_):
        steps.append('enter')
        try:
            yield
        finally:
            steps.append('leave')

    @contextlib.contextmanager
    def graph(*_, **kwargs):
        yield
        steps.append('fail')  # and stay on the stream
        raise RuntimeError('capture failed')

    _, graphed = models()
    for _ in range(cuda_graphs.WARM_UP):
        step(graphed, images(device))
    monkeypatch.setattr(torch.cuda, 'stream', stream)
    monkeypatch.setattr(torch.cuda, 'graph', graph)
    with pytest.raises(RuntimeError, match='capture failed'):
        graphed(images(device))
    assert steps == ['enter', 'fail', 'leave']


def test_gradients_of_images_that_a_failed_recording_overwrote_are_refused(
        models, device, monkeypatch):
    _, graphed = models()
    x = images(device)
    other = images(device, 1, 3, 32, 32)
    for _ in range(cuda_graphs.WARM_UP):
        step(graphed, x), step(graphed, other)
    loss = losses(graphed, x)[1]
    assert recorded(graphed) == 1

    def fail(*_):
        raise RuntimeError('no memory')

    monkeypatch.setattr(cuda_graphs._Recording, '_record', fail)
    with pytest.raises(RuntimeError, match='no memory'):
        graphed(other)
    with pytest.raises(RuntimeError, match='another forward'):
        loss.backward()


def test_new_parameter_in_the_memory_of_the_old_gets_its_gradient(
        models, device):
    _, graphed = models()
    x = images(device)
    for _ in range(4):
        step(graphed, x)
    norm = graphed.norm0
    norm.weight = torch.nn.Parameter(norm.weight.data)
    for _ in range(4):
        step(graphed, x)
        assert norm.weight.grad is not None
    assert recorded(graphed) == 1


def test_threads_get_their_own_results(models, device):
    eager, graphed = models()
    eager.eval(), graphed.eval()
    batches = [images(device, seed=seed) for seed in range(2)]
    with torch.no_grad():
        expected = [eager(x) for x in batches]
        for _ in range(3):
            graphed(batches[0])
    assert recorded(graphed) == 1

    def run(i):
        with torch.no_grad():
            return all(torch.equal(own, other) for _ in range(20)
                       for own, other in zip(graphed(batches[i]), expected[i]))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(run, (0, 1)))


def test_other_threads_wait_for_a_recording(models, device, monkeypatch):
    _, graphed = models()
    for _ in range(2):
        step(graphed, images(device))
    parameters, kind = [*graphed.parameters()], type(graphed.stages[0][0])
    forward = kind.forward
    recording, waiting = threading.Event(), threading.Event()

    def wait_once(self, x):
        # In the first pass of the recording, where the module has other
        # parameters than its own.
        if graphed.cuda_graphs.recording_thread and not recording.is_set():
            recording.set()
            waiting.wait(1)
        return forward(self, x)

    monkeypatch.setattr(kind, 'forward', wait_once)

    def other():
        recording.wait(60)
        step(graphed, images(device, seed=1))
        waiting.set()

    with ThreadPoolExecutor(1) as pool:
        graphed.zero_grad()
        result = pool.submit(other)
        with graphed.cuda_graphs.lock:  # up to the end of its forward pass
            losses(graphed, images(device))
        result.result(60)
    assert recording.is_set()
    assert not any(p.grad is None for p in parameters)


def test_weights_that_are_no_parameters_are_refused(models, device):
    """Such as views of what FSDP has gathered."""
    _, graphed = models()
    for m in list(graphed.modules()):
        for name, p in list(m._parameters.items()):
            if p is not None:
                del m._parameters[name]
                setattr(m, name, p.detach().requires_grad_() * 1)
    x = images(device)
    for _ in range(2):
        graphed(x)
    with pytest.raises(RuntimeError, match='cuda_graphs=False'):
        graphed(x)


def test_drop_path_is_drawn_for_each_batch(models, device):
    _, graphed = models(drop_path_rate=0.9)
    x = images(device, 8, 3, 32, 32)
    outs = [graphed(x)[1] for _ in range(8)]
    assert recorded(graphed) == 1
    assert not all(torch.equal(outs[-1], out) for out in outs[3:])


def test_module_with_hooks_runs_without_graphs(models, device):
    eager, graphed = models()
    called = []
    for model in (eager, graphed):
        model.stages[0][0].mlp.register_forward_hook(
            lambda *_: called.append(1))
    for _ in range(4):
        assert_same(step(graphed, images(device)), step(eager,
                                                        images(device)))
    assert recorded(graphed) == 0 and len(called) == 8


def test_checkpoints_around_the_backbone_run_without_graphs(models, device):
    eager, graphed = models()
    for seed in range(4):
        x = images(device, seed=seed)
        for model in (eager, graphed):
            model.zero_grad()
            outs = checkpoint(model, x, use_reentrant=False)
            sum(out.pow(2).mean() for out in outs).backward()
        assert_same(*([p.grad for p in model.parameters()]
                      for model in (graphed, eager)))
    assert recorded(graphed) == 0
    with torch.no_grad():
        for _ in range(3):
            checkpoint(graphed, x, use_reentrant=False)
    assert recorded(graphed) == 1


def test_changes_before_the_backward_pass_are_told(models, device):
    for model in models():
        for _ in range(3):
            loss = losses(model, images(device))[1]
        with torch.no_grad():
            model.stages[0][0].mlp.fc1.weight.add_(1)
        with pytest.raises(RuntimeError, match='modified by an inplace oper'):
            loss.backward()


def test_memory_is_given_back_when_the_model_moves(models, device):
    _, graphed = models()
    for _ in range(3):
        step(graphed, images(device))
    graphed.to(device)  # where it is
    assert recorded(graphed) == 1
    graphed.double()
    assert recorded(graphed) == 0 and graphed.cuda_graphs.memory is None


def test_other_type_in_the_same_memory_is_seen():
    numbers = torch.zeros(3, dtype=torch.bfloat16)
    layer = nn.Linear(1, 3).bfloat16()
    watched, seen = cuda_graphs._Watched(layer), []
    for dtype in torch.bfloat16, torch.float16, torch.bfloat16:
        layer.bias.data = numbers.view(dtype)
        seen.append(watched.look()[0])
    assert seen[0] == seen[2] != seen[1]


def test_synchronized_batch_norms_run_without_graphs(models, device):
    """All processes would have to record at the same time."""
    eager, graphed = models()
    graphed = nn.SyncBatchNorm.convert_sync_batchnorm(graphed)
    for _ in range(4):
        step(graphed, images(device))
    assert recorded(graphed) == 0
    graphed.eval()
    for _ in range(4):
        graphed(images(device))
    assert recorded(graphed) == 1


def test_shallow_copies_run_without_graphs(models, device):
    """Such as the replicas of DataParallel, whose weights are others."""
    _, graphed = models()
    graphed.eval()
    x = images(device)
    with torch.no_grad():
        assert graphed.cuda_graphs.recording(
            graphed._replicate_for_data_parallel(), x) is None
        for _ in range(3):
            graphed(x)
        replica = copy.copy(graphed)
        replica._modules = {**graphed._modules, 'stages': nn.ModuleList(
            copy.deepcopy(graphed.stages))}
        replica.stages[0][0].layer_scale_1 *= 2
        assert not torch.equal(replica(x)[0], graphed(x)[0])
    assert recorded(graphed) == 1


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, 'fp32_precision'),
    reason='torch has had these names since 2.9')
def test_tf32_asked_for_by_the_new_names_is_seen():
    # In a process of its own: torch refuses the old names after the new ones.
    code = """
import torch
from mmconv2former.cuda_graphs import _globals
before = _globals()
torch.backends.cuda.matmul.fp32_precision = 'tf32'
print('seen' if _globals() != before else 'not seen')
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True,
                          text=True)
    assert done.stdout == 'seen\n', done.stderr


def test_copies_have_graphs_of_their_own(models, device):
    eager, graphed = models()
    x = images(device)
    for _ in range(3):
        step(graphed, x)
    for twin in (copy.deepcopy(graphed), pickle.loads(pickle.dumps(graphed))):
        assert recorded(twin) == 0
        twin.load_state_dict(eager.state_dict())
        for _ in range(4):
            assert_same(step(twin, x)[:2], eager(x))
        assert recorded(twin) == 1
    assert recorded(graphed) == 1


@pytest.mark.parametrize('options', [
    dict(cuda_graphs=True, compile=True), dict(cuda_graphs=2, with_cp=True),
    dict(cuda_graphs=-1)
])
def test_what_cannot_be_recorded_is_refused(options):
    with pytest.raises(ValueError, match='cuda_graphs must be'):
        Conv2Former(TINY, **options)


def test_without_a_gpu_nothing_is_recorded(monkeypatch):
    lines = []
    monkeypatch.setattr(cuda_graphs, 'log_once', lines.append)
    model = Conv2Former(TINY, cuda_graphs=True).eval()
    for _ in range(4):
        model(torch.randn(1, 3, 32, 32))
    assert recorded(model) == 0
    assert set(lines) == {'no CUDA graphs on the cpu'}


def test_precisions_have_graphs_of_their_own(models, device):
    eager, graphed = models()
    x = images(device)
    for autocast in (False, True, False):
        for _ in range(4):
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                assert_same(step(graphed, x), step(eager, x))
    assert recorded(graphed) == 2


def test_hooks_of_all_modules_are_called_without_graphs(models, device):
    _, graphed = models()
    called = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda *_: called.append(1))
    try:
        counts = []
        for _ in range(4):
            called.clear()
            graphed(images(device))
            counts.append(len(called))
    finally:
        handle.remove()
    assert recorded(graphed) == 0 and len(set(counts)) == 1


@pytest.mark.parametrize('device', ['cpu'], indirect=True)
def test_switch_and_deterministic_algorithms_have_graphs_of_their_own(
        models, device, monkeypatch):
    _, graphed = models()
    x = images(device)

    def check(records):
        for _ in range(4):
            graphed(x)
        assert recorded(graphed) == records

    check(1)
    monkeypatch.setenv('MMCONV2FORMER_FUSED', '0')
    check(2)
    for name in ('deterministic', 'enabled'):
        value = getattr(torch.backends.cudnn, name)
        monkeypatch.setattr(torch.backends.cudnn, name, not value)
        check(3 if name == 'deterministic' else 4)
    torch.use_deterministic_algorithms(True)
    try:
        check(5)
    finally:
        torch.use_deterministic_algorithms(False)
    graphed.stages[0][0].fused = not graphed.stages[0][0].fused
    check(6)
    graphed.residual_in_fp32 = True
    check(7)


def test_transforms_of_torch_run_without_graphs(models, device):
    eager, graphed = (model.eval() for model in models())
    x = images(device)
    for _ in range(4):
        graphed(x)
    found = []
    for model in eager, graphed:

        def loss(parameters, model=model):
            outs = torch.func.functional_call(model, parameters, (x, ))
            return sum(out.square().mean() for out in outs)

        found.append(torch.func.grad(loss)(dict(model.named_parameters())))
    assert recorded(graphed) == 1
    assert_same(found[1].values(), found[0].values())


@pytest.mark.parametrize('device', ['cpu'], indirect=True)
def test_recording_draws_no_random_numbers(models, device):
    eager, graphed = models(drop_path_rate=.9)
    x = images(device)
    for _ in range(cuda_graphs.WARM_UP):
        graphed(x)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    graphed.cuda_graphs.recording(graphed, x)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    eager(x)  # to record on the tape is to run it once
    assert torch.equal(after, torch.get_rng_state())
