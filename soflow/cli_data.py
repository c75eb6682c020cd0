"""`soflow encode`, `soflow convert` and `soflow inspect`: data sets on disk."""

import argparse
import os
import sys
from pathlib import Path

from soflow.arguments import Command, command_parser, natural, positive
from soflow.config import OFFICIAL_VAE

DONE = 0
MIB = 2**20
MAX_SIDE = 8192


def _encode_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "encode",
        "Encode a folder of images, one folder per class, to the latents of a VAE, which `soflow train` reads with "
        "data.source=latents. Every image is cropped as ADM does. A call that was interrupted goes on when it is given "
        "again. Several processes: torchrun --nproc-per-node N -m soflow.cli encode ...",
        f"example:\n  soflow encode imagenet/train latents --vae {OFFICIAL_VAE}",
    )
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder with a folder of images per class")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write, new or unfinished")
    parser.add_argument(
        "--vae",
        default=OFFICIAL_VAE,
        metavar="NAME",
        help=f"folder of a diffusers AutoencoderKL, or its name on the hub (default {OFFICIAL_VAE})",
    )
    parser.add_argument("--size", type=_side, default=256, metavar="N", help="side of the crop (default 256)")
    parser.add_argument("--flip", action="store_true", help="encode the mirror image of every image too")
    _add_format(parser)
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="images at once (default 32)")
    parser.add_argument(
        "--max-bad",
        type=natural,
        default=0,
        metavar="N",
        help="files that may be undecodable; they are listed in bad_files.jsonl (default 0)",
    )
    parser.add_argument(
        "--decoder",
        choices=("auto", "dali", "pillow"),
        default="auto",
        help="auto takes DALI on a GPU where it is installed, else pillow (default)",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU when there is one (default)"
    )
    return parser


def _encode(args: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    from soflow.data.decode import open_decoder
    from soflow.data.encode import Encoder, EncodeSettings
    from soflow.data.image_folder import list_images
    from soflow.distributed import read_ranks, resolve_device
    from soflow.vae import load_vae

    rank, world_size = read_ranks()
    device = resolve_device(args.device, "--device")
    # As the official latents: TF32 would round them.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    listing = list_images(args.images)
    decode = open_decoder(args.decoder, device, threads=max(1, (os.cpu_count() or 1) // world_size))
    settings = EncodeSettings(args.size, args.flip, args.dtype, args.shard_mib * MIB)
    encoder = Encoder(listing, args.folder, load_vae(args.vae, device), decode, settings, device)
    total = sum(len(encoder.files(number)) for number in range(rank, encoder.writer.plan.num_shards, world_size))
    with tqdm(total=total, unit="image", file=sys.stderr, disable=None, position=rank) as bar:
        bad = encoder.run(args.batch_size, args.max_bad, rank, world_size, bar.update)
    if bad is None:
        print(f"{args.folder}: process {rank} is done; others still write")
    else:
        print(f"{args.folder}: {len(listing.paths) - len(bad)} images encoded, {len(bad)} left out")
    return DONE


def _convert_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "convert",
        "Convert the official HDF5 file of latents, imagenet_latent.hdf5, to a folder of shards, which is read many "
        "times faster. A call that was interrupted goes on when it is given again.",
        None,
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="the HDF5 file, or the folder it lies in")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write, new or unfinished")
    parser.add_argument(
        "--classes", type=positive, metavar="N", help="number of classes (default: the largest label + 1)"
    )
    _add_format(parser)
    return parser


def _convert(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from soflow.data.hdf5 import Hdf5Source, convert_hdf5

    source = Hdf5Source(args.file, args.classes)
    with tqdm(total=len(source), unit="sample", file=sys.stderr, disable=None) as bar:
        convert_hdf5(source, args.folder, args.dtype, args.shard_mib * MIB, bar.update)
    print(f"{args.folder}: {len(source)} samples of {source.num_classes} classes, {args.dtype}")
    return DONE


def _inspect_parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "inspect",
        "Print what a data set holds, and verify it: hashes of latents and archives, finite values, decodable images.",
        None,
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="latents, HDF5 file, CIFAR-10 archive or image folder")
    parser.add_argument("--size", type=_side, default=256, metavar="N", help="side of the crop of images (default 256)")
    parser.add_argument("--quick", action="store_true", help="do not read all of it")
    return parser


def _inspect(args: argparse.Namespace) -> int:
    from soflow.data import open_source
    from soflow.data.inspect import describe_source, guess_config

    config = guess_config(args.path, args.size)
    source = open_source(config)
    print("\n".join([f"{'source':<14}{config.source}", *describe_source(source, args.path)]), flush=True)
    if not args.quick:
        source.verify()
    print(f"{'verified':<14}{'no' if args.quick else 'yes'}")
    return DONE


def _side(text: str) -> int:
    side = positive(text)
    if side > MAX_SIDE:
        raise argparse.ArgumentTypeError(f"got {side}, expected at most {MAX_SIDE}")
    return side


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=("float16", "float32"), default="float16", help="of the latents (default float16)"
    )
    parser.add_argument("--shard-mib", type=positive, default=1024, metavar="N", help="MiB per shard (default 1024)")


COMMANDS = {
    "encode": Command("encode a folder of images to latents", _encode_parser, _encode),
    "convert": Command("convert the official file of latents to our format", _convert_parser, _convert),
    "inspect": Command("print what a data set holds, and verify it", _inspect_parser, _inspect),
}
