"""Count the parameters and the MACs of configs of the three tasks.

    python tools/get_flops.py CONFIG [--shape H W]

Neither data, weights nor memory is needed: the model lives on the meta
device, and a large detector takes a second.

MACs are multiply-accumulates of convolutions and matrix products, what papers
of this field print as FLOPs. torch's FlopCounterMode counts them, two FLOPs
for each. mmengine's ``get_model_complexity_info`` adds norms and pooling to
them, which papers leave out, and has to trace the model, which detectors do
not take.

What the input is, unless --shape says otherwise:

- classification: the crop that the config tests with;
- detection: 1280x800, as in the papers of Swin and ConvNeXt;
- segmentation: the height of the training crop and four times as wide, as in
  ConvNeXt: 2048x512 for crops of 512. The auxiliary head is there in training
  only and does not count to the total.

How many boxes a two-stage detector proposes depends on the image, and on the
meta device there is none. What its RoI heads do for one box does not: they
are counted for as many boxes as testing lets pass at most
(``test_cfg.rpn.max_per_img``, 1000) and as many masks
(``test_cfg.rcnn.max_per_img``, 100), the numbers that the published figures
stand for. RoIAlign and NMS have no MACs.
"""
import argparse

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import launch
from argument_types import positive
from config_queries import data_sets, preprocessing, type_name

TRAINING_ONLY = 'auxiliary_head'
# Parts that read the feature maps of the neck, or of the backbone.
HEADS = ('head', 'decode_head', TRAINING_ONLY, 'rpn_head', 'bbox_head')
PARTS = ('backbone', 'neck', *HEADS, 'roi_head')
ROI_PARTS = 'bbox_head', 'mask_head'
# Where a part is not known.
ADVICE = ("get_flops.py of the library's own tools, which runs a model as a "
          'whole, may count it')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Args:
        argv (list[str], optional): Arguments; those of the process if None.

    Returns:
        Namespace: The options.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    launch.add_config(parser)
    parser.add_argument(
        '--shape',
        nargs=2,
        type=positive,
        metavar=('H', 'W'),
        help='height and width of the input in pixels')
    return parser.parse_args(argv)


def crop_size(loader: dict | None) -> int | tuple[int, int] | None:
    """Size of the crop in the pipeline of a data loader, one number or height
    and width; None without."""
    keys = dict(CenterCrop='crop_size', RandomCrop='crop_size',
                RandomResizedCrop='scale')
    for _, data_set in data_sets(loader.dataset, '') if loader else ():
        for transform in data_set.get('pipeline') or ():
            name = type_name(transform)
            if name in keys:
                size = transform[keys[name]]
                # CenterCrop is mmcv's and takes width and height, the others
                # are mmpretrain's and take height and width.
                is_swapped = name == 'CenterCrop' and not isinstance(size, int)
                return size[::-1] if is_swapped else size
    return None


def default_shape(cfg: Config) -> tuple[int, int]:
    """The input that figures for a config are given for.

    Args:
        cfg (Config): The config.

    Returns:
        tuple[int, int]: Height and width in pixels.

    Raises:
        SystemExit: If the config does not say.
    """
    if 'decode_head' in cfg.model:
        _, settings = preprocessing(cfg)
        size = settings.get('size')
        size = size and (size[0], 4 * size[0])
    elif 'head' in cfg.model:
        size = crop_size(cfg.get('test_dataloader')) or crop_size(
            cfg.get('train_dataloader'))
    else:
        size = (800, 1280)
    if size is None:
        raise SystemExit('the config names no size of the input (a crop in '
                         'the pipelines for classification, '
                         'data_preprocessor.size for segmentation): give it '
                         'with --shape H W')
    return (size, size) if isinstance(size, int) else tuple(size)


def build_model(cfg: Config) -> nn.Module:
    """Build a model without memory for its weights.

    Args:
        cfg (Config): The config.

    Returns:
        nn.Module: The model on the meta device, in evaluation mode.

    Raises:
        SystemExit: If it has parts that this tool cannot count.
    """
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    try:
        with torch.device('meta'):
            model = MODELS.build(cfg.model)
    except RuntimeError:
        # Some backbones calculate with tensors while they are built (the drop
        # path rates of ConvNeXt), which takes a real device.
        model = MODELS.build(cfg.model).to('meta')
    model.eval()
    unknown = unknown_parts(model, PARTS)
    if unknown or not hasattr(model, 'backbone'):
        raise SystemExit(
            f'{type(model).__name__} cannot be counted: this tool knows '
            f'{", ".join(PARTS)}, and the model has '
            f'{", ".join(name for name, _ in model.named_children())}. '
            + ADVICE)
    roi_head = getattr(model, 'roi_head', None)
    if roi_head is not None and (unknown := unknown_parts(roi_head,
                                                          ROI_PARTS)):
        raise SystemExit(
            f'{type(roi_head).__name__} cannot be counted: of a roi_head this '
            f'tool knows {" and ".join(ROI_PARTS)}, and this one also has '
            f'{", ".join(unknown)}. {ADVICE}')
    return model


def unknown_parts(module: nn.Module, known: tuple[str, ...]) -> list[str]:
    """Names of other parts than these that have parameters."""
    return [name for name, part in module.named_children()
            if name not in known and count_parameters(part)]


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, trained or frozen."""
    return sum(p.numel() for p in module.parameters())


def each(module: nn.Module) -> list[nn.Module]:
    """The modules of a list of modules, or the module itself."""
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def run_roi_head(roi_head: nn.Module, test_cfg: dict) -> None:
    """Run box and mask heads on as many regions as testing has at most.

    Raises:
        SystemExit: If the config does not say how many these are.
    """
    if 'rpn' not in test_cfg:
        raise SystemExit(
            'the roi_head cannot be counted, for it depends on the file of '
            'proposals on how many regions it runs: the model has no '
            f'test_cfg.rpn. {ADVICE}')
    for kind, regions in (('bbox', test_cfg.rpn.max_per_img),
                          ('mask', test_cfg.rcnn.max_per_img)):
        if not getattr(roi_head, f'with_{kind}'):
            continue
        extractors = getattr(roi_head, f'{kind}_roi_extractor')
        for extractor, head in zip(
                each(extractors), each(getattr(roi_head, f'{kind}_head'))):
            head(
                torch.empty(regions, extractor.out_channels,
                            *extractor.roi_layers[0].output_size))


def count(cfg: Config, shape: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Count parameters and MACs of a model, part by part.

    Args:
        cfg (Config): The config.
        shape (tuple[int, int]): Height and width of the input in pixels.

    Returns:
        dict[str, tuple[int, int]]: Parameters and MACs by part, in the order
        of computation, and those of the model as 'total'. The total has the
        parameters of the auxiliary head, but not its MACs.

    Raises:
        SystemExit: If a part cannot be counted.
    """
    model = build_model(cfg)
    rows, total = {}, 0
    # Of the config: backbones that keep it mean what they like by it.
    channels = cfg.model.backbone.get('in_channels', 3)
    feats = torch.empty(1, channels, *shape, device='meta')
    for name in PARTS:
        part = getattr(model, name, None)
        if part is None:
            continue
        try:
            with torch.no_grad(), torch.device('meta'), FlopCounterMode(
                    display=False) as counter:
                if name == 'roi_head':
                    run_roi_head(part, cfg.model.test_cfg)
                elif name in HEADS:
                    for head in each(part):
                        head(feats)
                else:
                    feats = part(feats)
        except ValueError as error:  # our backbone about the size
            raise SystemExit(
                f'the {name} {type(part).__name__} {error}; give another size '
                'with --shape H W') from error
        except (NotImplementedError, RuntimeError, TypeError) as error:
            raise SystemExit(
                f'the {name} {type(part).__name__} cannot be counted, for it '
                'does not run on feature maps or regions alone, without '
                f'numbers in them, of an image of {shape[1]}x{shape[0]} '
                f'({type(error).__name__}: {error}). {ADVICE}') from error
        macs = counter.get_total_flops() // 2
        rows[name] = count_parameters(part), macs
        total += macs * (name != TRAINING_ONLY)
    rows['total'] = count_parameters(model), total
    return rows


def main(argv: list[str] | None = None) -> None:
    """Print the table.

    Args:
        argv (list[str], optional): Arguments; those of the process if None.
    """
    args = parse_args(argv)
    cfg = launch.read_config(args)
    launch.check_model(cfg, args.config)
    shape = args.shape or default_shape(cfg)
    rows = count(cfg, shape)
    print(f'input: {shape[1]}x{shape[0]} (width x height)')
    if 'roi_head' in rows:
        test_cfg = cfg.model.test_cfg
        masks = f', {test_cfg.rcnn.max_per_img} masks' \
            if cfg.model.roi_head.get('mask_head') else ''
        print(f'roi_head: {test_cfg.rpn.max_per_img} boxes{masks}')
    if TRAINING_ONLY in rows:
        print(f'{TRAINING_ONLY}: in training only, no MACs in the total')
    print(f'{"part":14}  {"parameters":>11}  {"MACs":>10}')
    for name, (parameters, macs) in rows.items():
        print(f'{name:14}  {parameters:11,}  {macs / 1e9:8.2f} G')


if __name__ == '__main__':
    main()
