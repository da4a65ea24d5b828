"""The command line. Parsing imports nothing heavy; the work is in :mod:`tokenenv.commands`."""

from __future__ import annotations

import argparse
import sys

from tokenenv._version import __version__
from tokenenv.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="tokenenv",
        description="Vision Transformer inference as a Markov game: agents decide which tokens "
        "go on.",
    )
    parser.add_argument("--version", action="version", version=f"tokenenv {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a system's policy; without options on the embedded game, offline",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a policy and write a run folder: config.json, policy.safetensors, "
        "report.json,\ncurve.png, tokens.png, checkpoint.safetensors, TensorBoard events.",
        epilog="examples:\n  tokenenv train rl4evit\n"
        "  tokenenv train rl4evit --model deit_tiny_patch16_224 --data imagenet/train "
        "--images 3000\n  tokenenv train rl4evit --set reward=alpha_beta --set beta=0.1",
    )
    train.add_argument("system", choices=["rl4evit"], help="which system")
    _model_options(train)
    train.add_argument("--out", metavar="DIR", help="run folder (default: a new one under runs/)")
    train.add_argument("--images", type=_positive, metavar="N", help="use N images of --data")
    train.add_argument("--seed", type=int, default=0, metavar="S", help="default: 0")
    train.add_argument("--resume", action="store_true", help="go on with the run in --out")
    train.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting, see agents/rl4evit.py; repeatable",
    )

    evaluate = commands.add_parser(
        "evaluate",
        help="accuracy, multiply-adds and speed of a policy against the dense model",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run every image through the dense model and through a policy.",
        epilog="examples:\n  tokenenv evaluate runs/rl4evit-0\n"
        "  tokenenv evaluate cls-attention:keep=0.7,blocks=3/6/9 --model deit_tiny_patch16_224 "
        "--data val --json r.json",
    )
    evaluate.add_argument(
        "what",
        metavar="WHAT",
        help="a run folder, a shipped policy, keep-all, random:keep=0.7, "
        "cls-attention:keep=0.7,blocks=3/6/9 or norm:keep=0.7",
    )
    _model_options(evaluate)
    evaluate.add_argument("--limit", type=_positive, metavar="N", help="at most N images")
    evaluate.add_argument("--batch", type=_positive, default=64, metavar="N", help="default: 64")
    evaluate.add_argument(
        "--restrict",
        action="store_true",
        help="predict only among the classes of --data (the ImageNet-A and -R protocol)",
    )
    evaluate.add_argument("--json", metavar="FILE", help="write everything there")

    commands.add_parser("envs", help="the registered environments, one line each")
    return parser


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="NAME", help="any timm ViT (default: embedded digits)")
    parser.add_argument("--weights", metavar="FILE", help=".safetensors or .pth state dict")
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="folder of class/image, or a torchvision data set such as CIFAR10:ROOT",
    )
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda ...; default: cpu")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 on success, 2 for a user's mistake, 130 after Ctrl-C."""
    args = build_parser().parse_args(argv)
    try:
        if args.command == "envs":
            from tokenenv.envs.ids import listing

            print(listing())
            return 0
        from tokenenv import commands

        return {"train": commands.train, "evaluate": commands.evaluate}[args.command](args)
    except UserError as error:
        print(f"tokenenv: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tokenenv: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
