"""The operators against their plain forms."""
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mmconv2former.operators import depthwise_conv2d


def inputs(n, c, h, w, k, dtype, memory_format=torch.contiguous_format):
    torch.manual_seed(h * w + k)
    x, grad = (
        torch.randn(n, c, h, w, dtype=torch.double).to(dtype).contiguous(
            memory_format=memory_format) for _ in range(2))
    weight = torch.randn(c, 1, k, k, dtype=torch.double).to(dtype)
    bias = torch.randn(c, dtype=torch.double).to(dtype)
    return [t.requires_grad_() for t in (x, weight, bias)], grad


def plain(x, weight, bias):
    return F.conv2d(
        x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))


def gradients(function, tensors, grad):
    return torch.autograd.grad(function(*tensors), tensors, grad)


def is_fast(out):
    return type(out.grad_fn).__name__ == '_DepthwiseConvBackward'


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('memory_format',
                         [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('n, c, h, w, k', [
    (3, 8, 56, 56, 11), (1, 20, 13, 13, 11), (2, 36, 7, 7, 11),
    (4, 8, 5, 7, 11), (3, 8, 1, 1, 11), (2, 20, 1, 13, 7), (5, 8, 2, 2, 7),
    (2, 72, 13, 5, 5), (2, 8, 56, 13, 21), (1, 8, 7, 7, 21), (2, 8, 16, 9, 15),
    (2, 8, 30, 30, 13),
])
def test_gradients_are_as_exact_as_those_of_the_plain_form(
        n, c, h, w, k, memory_format, dtype):
    tensors, grad = inputs(n, c, h, w, k, dtype, memory_format)
    exact = gradients(plain, [t.double() for t in tensors], grad.double())
    theirs = gradients(plain, tensors, grad)
    assert is_fast(depthwise_conv2d(*tensors))
    ours = gradients(depthwise_conv2d, tensors, grad)
    for own, other, true in zip(ours, theirs, exact, strict=True):
        assert (own.dtype, own.shape) == (other.dtype, other.shape)
        # 1e-6 of the largest value: the sums are taken in another order.
        noise = 1e-6 * true.abs().max()
        assert (own - true).abs().max() <= 2 * (
            other - true).abs().max() + noise


@pytest.mark.parametrize('h, w, k', [(5, 4, 5), (2, 3, 7), (3, 3, 15)])
def test_gradients_and_their_gradients_in_double_precision(h, w, k):
    tensors, _ = inputs(2, 2, h, w, k, torch.double)
    assert is_fast(depthwise_conv2d(*tensors))
    assert torch.autograd.gradcheck(depthwise_conv2d, tensors)
    assert torch.autograd.gradgradcheck(depthwise_conv2d, tensors)


def test_frozen_parts_get_no_gradient():
    (x, weight, bias), grad = inputs(2, 8, 9, 9, 7, torch.float32)
    out = depthwise_conv2d(x.detach(), weight, bias.detach())
    out.backward(grad)
    assert weight.grad is not None and x.grad is None and bias.grad is None


def test_autocast_computes_in_its_precision_and_returns_full_gradients():
    tensors, grad = inputs(2, 8, 9, 9, 7, torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        out, reference = (f(*tensors) for f in (depthwise_conv2d, plain))
    assert is_fast(out) and out.dtype == torch.bfloat16
    assert torch.equal(out, reference)
    ours, theirs = (
        torch.autograd.grad(o, tensors, grad.bfloat16())
        for o in (out, reference))
    for own, other in zip(ours, theirs, strict=True):
        assert own.dtype == torch.float32
        torch.testing.assert_close(own, other, rtol=2e-2, atol=2e-1)


def test_checkpointing_and_changed_weights_give_the_same_gradients():
    tensors, grad = inputs(2, 8, 9, 9, 7, torch.float32)
    for _ in range(2):
        kept = gradients(depthwise_conv2d, tensors, grad)
        again = gradients(
            lambda *t: checkpoint(depthwise_conv2d, *t, use_reentrant=False),
            tensors, grad)
        theirs = gradients(plain, tensors, grad)
        for own, recomputed, other in zip(kept, again, theirs, strict=True):
            assert torch.equal(own, recomputed)
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            tensors[1].mul_(-2)


def test_plain_form_is_taken_where_the_other_is_not_faster(monkeypatch):
    (x, weight, bias), _ = inputs(1, 8, 9, 9, 7, torch.float32)
    with torch.no_grad():
        assert depthwise_conv2d(x, weight, bias).grad_fn is None
    assert not is_fast(depthwise_conv2d(x, weight.detach(), bias.detach()))
    assert not is_fast(depthwise_conv2d(x, weight[..., :3, :3], bias))
    assert is_fast(depthwise_conv2d(x, weight, bias))
    monkeypatch.setenv('MMCONV2FORMER_FUSED', '0')
    assert not is_fast(depthwise_conv2d(x, weight, bias))
