"""The table of variants; adding one is adding a row."""
from collections.abc import Sequence

# One row per model. The hierarchical ones are those of the paper (table of
# variants, https://arxiv.org/abs/2211.11943) with the depths and kernels of
# the official code (https://github.com/HVision-NKU/Conv2Former); 'base-22k' is
# that of its base model for ImageNet-22K.
# The paper gives the isotropic models 18 blocks and their sizes but not their
# widths: 320 and 640 are our choice, which meets 23 M and 86 M parameters.
ARCHS = {
    'nano':
    dict(depths=(2, 2, 8, 2), dims=(64, 128, 256, 512), kernel_size=7),
    'tiny':
    dict(depths=(3, 3, 12, 3), dims=(72, 144, 288, 576), kernel_size=11),
    'small':
    dict(depths=(4, 4, 32, 4), dims=(72, 144, 288, 576), kernel_size=11),
    'base':
    dict(depths=(4, 4, 34, 4), dims=(96, 192, 384, 768), kernel_size=11),
    'base-22k':
    dict(depths=(4, 4, 34, 4), dims=(96, 192, 384, 768), kernel_size=7),
    'large':
    dict(depths=(4, 4, 48, 4), dims=(128, 256, 512, 1024), kernel_size=11),
    'isotropic-small':
    dict(depths=(18, ), dims=(320, ), kernel_size=11, stem='patch'),
    'isotropic-small-3conv':
    dict(depths=(18, ), dims=(320, ), kernel_size=11, stem='3conv'),
    'isotropic-base':
    dict(depths=(18, ), dims=(640, ), kernel_size=11, stem='patch'),
    'isotropic-base-3conv':
    dict(depths=(18, ), dims=(640, ), kernel_size=11, stem='3conv'),
}
# One row per stem: its stride, and the kernel of its last convolution, by
# which a file of weights is recognised. Their layers are in
# backbone.STEM_LAYERS under the same keys.
STEMS = {
    'conv': dict(stride=4, last_kernel=2),
    'patch': dict(stride=16, last_kernel=16),
    '3conv': dict(stride=16, last_kernel=4),
}
ARCH_ALIASES = {
    'n': 'nano',
    't': 'tiny',
    's': 'small',
    'b': 'base',
    'b-22k': 'base-22k',
    'l': 'large',
    'is': 'isotropic-small',
    'is-3conv': 'isotropic-small-3conv',
    'ib': 'isotropic-base',
    'ib-3conv': 'isotropic-base-3conv',
}


def resolve_arch(arch: str | dict) -> dict:
    """Settings of an architecture, given by name or as a dict.

    Args:
        arch (str | dict): A name or short form in the table of variants, or
            a dict with ``depths``, ``dims``, ``kernel_size`` and, optionally,
            ``stem``, a key of ``STEMS`` (defaults to 'conv').

    Returns:
        dict: ``depths`` and ``dims`` (tuples of int, one per stage),
        ``kernel_size`` (int) and ``stem`` (str).

    Raises:
        ValueError: If the name is unknown or the dict is not as above.
    """
    if isinstance(arch, str):
        name = arch.lower().replace('_', '-')
        name = ARCH_ALIASES.get(name, name)
        if name not in ARCHS:
            raise ValueError(
                f"unknown arch '{arch}'; expected one of "
                f'{", ".join(ARCHS)}, a short form '
                f'({", ".join(ARCH_ALIASES)}), or a dict with depths, dims '
                'and kernel_size')
        arch = ARCHS[name]
    elif not isinstance(arch, dict):
        raise ValueError(f'arch must be a name or a dict, got {arch!r}')
    keys = {'depths', 'dims', 'kernel_size'}
    if not keys <= set(arch) <= keys | {'stem'}:
        raise ValueError(
            'arch as a dict needs depths, dims and kernel_size and may have '
            f'stem; got the keys {", ".join(sorted(arch))}')
    depths, dims = arch['depths'], arch['dims']
    if not isinstance(depths, Sequence) or not isinstance(dims, Sequence) \
            or len(depths) != len(dims) or not depths \
            or not all(type(n) is int and n > 0 for n in (*depths, *dims)):
        raise ValueError(
            'depths and dims need one positive integer per stage each; got '
            f'depths {depths} and dims {dims}')
    stem = arch.get('stem', 'conv')
    if not isinstance(stem, str) or stem not in STEMS:
        raise ValueError(f'unknown stem {stem!r}; expected one of '
                         f'{", ".join(STEMS)}')
    return dict(depths=tuple(depths), dims=tuple(dims),
                kernel_size=arch['kernel_size'], stem=stem)


def describe_arch(settings: dict) -> str:
    """Name the architecture with these settings.

    Args:
        settings (dict): What :func:`resolve_arch` returns.

    Returns:
        str: Such as ``"arch 'tiny' (depths 3-3-12-3, dims 72-144-288-576,
        kernel 11)"``; the first row of the table where only the kernel
        differs, 'of its own' where no row has these depths and dims.
    """
    name, rest = 'of its own', ''
    for row_name, row in ARCHS.items():
        row = resolve_arch(row)
        if row == settings:
            name, rest = f"'{row_name}'", ''
            break
        if not rest and {
                **row, 'kernel_size': settings['kernel_size']} == settings:
            name = f"'{row_name}'"
            rest = f' with kernel_size={settings["kernel_size"]}'
    depths, dims = ('-'.join(map(str, settings[key]))
                    for key in ('depths', 'dims'))
    stem = {'conv': '', None: ', a stem of another kind'}.get(
        settings['stem'], f', stem {settings["stem"]}')
    return (f'arch {name}{rest} (depths {depths}, dims {dims}, kernel '
            f'{settings["kernel_size"]}{stem})')
