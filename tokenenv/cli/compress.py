"""``tokenenv compress``: a model and a policy as one faster model on disk."""

from __future__ import annotations

import argparse
from pathlib import Path

from agents.policies.words import parse_policy
from tokenenv.cli.common import open_backbone
from tokenenv.cli.evaluate import adopt, writable_file
from tokenenv.cli.merged import is_merged
from tokenenv.deploy.compressed import CONFIG, compress
from tokenenv.deploy.onnx import check_export, export_onnx
from tokenenv.errors import UserError


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    if args.export and Path(args.export).resolve() == Path(args.out).resolve():
        raise UserError("--out is a folder and --export a file: give them different names")
    with writable_file(args.export, "--export"):
        if Path(args.what, CONFIG).is_file():
            raise UserError(
                f"'{args.what}' is compressed already: give the policy it was made with"
            )
        if is_merged(args.what):
            raise UserError(
                f"'{args.what}' is a model already, whose tokens merge by themselves: "
                f"tokenenv.ltm.load_ltm('{args.what}') gives it"
            )
        if args.export and args.dtype != "float32":
            raise UserError(f"--export writes float32 only, not {args.dtype}: leave --dtype out")
        if args.export:
            check_export()
        adopt(args, args.what)
        backbone, name = open_backbone(args, images=False)
        fast = compress(backbone.model, parse_policy(args.what, backbone.depth), args.execution)
        fast.save(args.out)
        print(f"{name} with {args.what} is in {args.out}: tokenenv.load_compressed('{args.out}')")
        if args.export:
            print("exporting, which takes up to some minutes ...")
            export_onnx(fast, args.export)
            print(f"{args.export} takes one image at a time, each at its own length")
    return 0
