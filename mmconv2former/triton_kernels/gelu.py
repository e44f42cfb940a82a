"""GELU, that of erf, and its derivative.

Products and sums are asked for as one instruction: left to the compiler, some
would be two, and a value that is computed by two kernels would not be the same
in both. Of factors, ``-1. * u`` is free; ``-u`` would be 0 - u, one more.
"""
import triton
import triton.language as tl


@triton.jit
def gelu_tail(u, EXACT: tl.constexpr):
    """Normal distribution function at -u, u >= 0, in one exp2.

    The exponent is a polynomial fit of log2(erfc(u / sqrt(2)) / 2), -1 at 0.
    With ``EXACT`` it is wrong by 2e-8 in GELU, less than the rounding of
    fp32, and takes a third of the instructions of erf; with those, GELU would
    cost more than the traffic of the passes it is fused into. Without, for
    results in 16 bits, it is wrong by 1.4e-4 of the value down to u = 3 and by
    1e-3 down to 5, where fp16 rounds by up to 5e-4 and bf16 by 4e-3.
    """
    if EXACT:
        e = tl.fma(u, -2.35749349e-06, 3.38984428e-05)
        e = tl.fma(e, u, -1.61420714e-04)
        e = tl.fma(e, u, -1.93259766e-04)
        e = tl.fma(e, u, 7.13178283e-03)
        e = tl.fma(e, u, -5.25392666e-02)
        e = tl.fma(e, u, -4.59195673e-01)
        e = tl.fma(e, u, -1.15110636)
    else:
        e = tl.fma(u, -3.03835660e-04, 5.68419990e-03)
        e = tl.fma(e, u, -4.78710736e-02)
        e = tl.fma(e, u, -4.64317275e-01)
        e = tl.fma(e, u, -1.14940564)
    return tl.exp2(tl.fma(e, u, -1.))


@triton.jit
def gelu(x, EXACT: tl.constexpr):
    """GELU (that of erf, not of tanh); infinities give NaN."""
    u = tl.abs(x)
    return tl.fma(-1. * u, gelu_tail(u, EXACT), tl.maximum(x, 0.))


@triton.jit
def gelu_slope(x, tail):
    """Derivative of GELU, with the tail at abs(x)."""
    u = tl.abs(x)
    # exp(-u * u / 2) / sqrt(2 * pi)
    density = tl.exp2(tl.fma(-0.72134752 * u, u, -1.32574806))
    slope = tl.fma(-1. * u, density, tail)
    return tl.where(x > 0., 1. - slope, slope)


@triton.jit
def gelu_and_slope(x, EXACT: tl.constexpr):
    """GELU and its derivative."""
    u = tl.abs(x)
    tail = gelu_tail(u, EXACT)
    return tl.fma(-1. * u, tail, tl.maximum(x, 0.)), gelu_slope(x, tail)
