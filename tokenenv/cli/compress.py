"""``tokenenv compress``: its options, and the call of :func:`tokenenv.compress`."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenenv.cli.options import (
    WHAT,
    Parser,
    add_dtype,
    add_execution,
    add_model_options,
    add_trust,
    preprocessing,
    writable_file,
)
from tokenenv.errors import UserError
from tokenenv.paths import as_path


def add_parser(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the parser of ``tokenenv compress`` with its options."""
    compress = commands.add_parser(
        "compress",
        help="save a model and a method as one faster model",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Write a folder that tokenenv.load_compressed reads, and with --export an ONNX "
        "file,\nwhich takes one image at a time and computes only the tokens that are kept.",
        epilog="examples:\n  tokenenv compress norm:keep=0.7 --out fast\n"
        "  tokenenv compress rl4evit-deit_tiny --weights deit.safetensors --out fast "
        "--export fast.onnx",
    )
    compress.add_argument("what", metavar="WHAT", help=WHAT)
    add_model_options(compress, images=False)
    add_dtype(compress)
    add_execution(compress)
    compress.add_argument("--out", metavar="DIR", required=True, help="a new folder")
    compress.add_argument(
        "--export", metavar="FILE", help="write ONNX there (pip install tokenenv[export])"
    )
    add_trust(compress)


def run(args: argparse.Namespace) -> int:
    """Run ``tokenenv compress``; returns the exit status."""
    from tokenenv.api.compress import compress, glance
    from tokenenv.deploy.onnx import check_export, onnx_bytes
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
            trust=args.trust,
        )
        exported = b""
        if args.export:  # first, as it may be refused
            print("exporting, which takes up to some minutes ...")
            exported = onnx_bytes(fast)
        fast.save(args.out)
        name = fast.backbone.architecture
        print(f"{name} with {args.what} is in {args.out}: tokenenv.load_compressed('{args.out}')")
        speeds = glance(fast)
        ratios = ", ".join(f"{row.speedup:.2f} x at batch {row.batch}" for row in speeds)
        print(f"speed over the dense model at a glance: {ratios}; 'tokenenv bench' measures it")
        if slow := [str(row.batch) for row in speeds if row.speedup < 1]:
            print(f"slower than the dense model here at batch {' and '.join(slow)}")
        if args.export:
            write_bytes(Path(args.export), exported)
            print(f"{args.export} takes one image at a time, each at its own length")
    return 0
