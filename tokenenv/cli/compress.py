"""``tokenenv compress``: its options, and the call of :func:`tokenenv.compress`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from tokenenv.cli.options import (
    WHAT,
    Parser,
    add_dtype,
    add_execution,
    add_model_options,
    add_trust,
    positive,
    preprocessing,
    writable_file,
)
from tokenenv.errors import UserError
from tokenenv.paths import as_path

if TYPE_CHECKING:
    from tokenenv.api.compress import Measured
    from tokenenv.deploy.compressed import CompressedViT


def add_parser(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the parser of ``tokenenv compress`` with its options."""
    compress = commands.add_parser(
        "compress",
        help="save a model and a method as one faster model",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Write a folder that tokenenv.load_compressed reads, and with --export an ONNX "
        "file.\nBoth hold preprocessing, class names and, with --data, the accuracy there.",
        epilog="examples:\n  tokenenv compress norm:keep=0.7 --out fast\n"
        "  tokenenv compress rl4evit-deit_tiny --weights deit.safetensors --out fast "
        "--export fast.onnx\n  tokenenv compress tome:r=8 --weights model_best.pth.tar "
        "--data flowers/val --out fast --export fast.onnx",
    )
    compress.add_argument("what", metavar="WHAT", help=WHAT)
    add_model_options(compress)
    add_dtype(compress)
    add_execution(compress)
    compress.add_argument("--out", metavar="DIR", required=True, help="a new folder")
    compress.add_argument("--limit", type=positive, metavar="N", help="at most N images of --data")
    compress.add_argument(
        "--classes", metavar="FILE", help="names of the classes, one a line, in the model's order"
    )
    compress.add_argument(
        "--export", metavar="FILE", help="write ONNX there (pip install tokenenv[export])"
    )
    add_trust(compress)


def run(args: argparse.Namespace) -> int:
    """Run ``tokenenv compress``; returns the exit status."""
    from tokenenv.api.compress import check_saved, compress, measure
    from tokenenv.deploy.onnx import check_export, graph_bytes, takes_batches, with_description
    from tokenenv.storage import check_new, write_bytes

    if args.export and Path(args.export).resolve() == Path(args.out).resolve():
        raise UserError("--out is a folder and --export a file: give them different names")
    with writable_file(args.export, "--export"):
        if args.export and args.dtype != "float32":
            raise UserError(f"--export writes float32 only, not {args.dtype}: leave --dtype out")
        if args.export:
            check_export()
        check_new(as_path(args.out, "--out"))
        fast = compress(
            args.model,
            args.what,
            args.execution,
            weights=args.weights,
            device=args.device,
            dtype=args.dtype,
            preprocessing=preprocessing(args),
            classes=args.classes,
            trust=args.trust,
        )
        graph = b""
        if args.export:  # first, as it may be refused
            graph = graph_bytes(fast, lambda step: print(f"exporting: {step} ...", flush=True))
        found = measure(fast, args.data, limit=args.limit)
        fast.save(args.out)
        check_saved(fast, args.out)
        name = fast.backbone.architecture
        print(f"{name} with {args.what} is in {args.out}: tokenenv.load_compressed('{args.out}')")
        _print_measured(fast, found)
        if args.export:
            write_bytes(Path(args.export), with_description(fast, graph))
            many = "a batch of any size" if takes_batches(fast) else "one image at a time"
            print(f"{args.export} takes {many}; its logits are the model's to 1e-4")
    return 0


def _print_measured(fast: CompressedViT, found: Measured) -> None:
    if found.evaluation is not None:
        numbers, change = fast.measured, found.evaluation.change()
        print(
            f"{numbers['data']}: top-1 {numbers['top1']:.2f} %, dense "
            f"{numbers['top1_dense']:.2f} %, change {change} points (95 % interval)"
        )
    if fast.classes is None:
        print("nobody knows the names of its classes: --data or --classes tells them")
    ratios = ", ".join(f"{row.speedup:.2f} x at batch {row.batch}" for row in found.speeds)
    print(f"speed over the dense model at a glance: {ratios}; 'tokenenv bench' measures it")
    if slow := [str(row.batch) for row in found.speeds if row.speedup < 1]:
        print(f"slower than the dense model here at batch {' and '.join(slow)}")
