"""``tokenenv train``: its options, and the call of :func:`agents.training.train`."""

from __future__ import annotations

import argparse
from typing import Any

from agents.systems.registry import SHOWN, SHOWN_ON, SYSTEMS, find_system
from agents.systems.settings import SystemConfig, read_settings, settings_help
from tokenenv.cli.options import Parser, add_dtype, add_model_options, positive, preprocessing, seed
from tokenenv.errors import UserError

INTERRUPTED = 130


def add_parser(commands: argparse._SubParsersAction[Parser]) -> None:
    """Add the parser of ``tokenenv train`` with its options."""
    train = commands.add_parser(
        "train",
        help="train a system; without options on embedded images, offline",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a system and write a run folder: config.json, policy.safetensors, "
        "report.json,\ncurve.png, tokens.png, before_after.gif, checkpoint.safetensors and "
        "TensorBoard events.\nFine-tuning adds model.safetensors and leaves before_after.gif out; "
        "ltm writes that and\nltm.json, and no policy."
        "\n\n"
        "torchrun --standalone --nproc-per-node N -m tokenenv train SYSTEM ... divides every batch "
        "among\nN processes; with --device cuda each uses a GPU of its own.\n\n"
        "Ctrl-C (or SIGTERM) finishes the update in progress, keeps the best policy so far, "
        "writes the\nwhole report and exits with status 130; a second one stops at once. After "
        "either, --resume\ncontinues the run; that of a policy also with another number of "
        "processes.",
        epilog="examples:\n  tokenenv train\n  tokenenv train dora\n"
        "  tokenenv train rl4evit --model deit_tiny_patch16_224 --data imagenet/train "
        "--images 3000\n  tokenenv train rl4evit --set reward=alpha_beta --set beta=0.1\n"
        "  tokenenv train rl4evit --out runs/rl4evit-0 --resume\n"
        "  torchrun --standalone --nproc-per-node 4 -m tokenenv train dora --device cuda\n"
        "  tokenenv train mstm --set keep=0.5\n"
        "  tokenenv train ltm --model swin_tiny_patch4_window7_224 --data imagenet/train\n"
        "  tokenenv train rl4evit-finetune --set policy=runs/rl4evit-0\n"
        "  tokenenv train my_system.py:MyConfig",
    )
    train.add_argument(
        "system",
        metavar="SYSTEM",
        nargs="?",
        help=f"default: {SHOWN}, on {SHOWN_ON} if neither --model nor --data is given; "
        + "; ".join(f"{name}: {system.summary}" for name, system in SYSTEMS.items())
        + "; or a class of settings of your own, module:Config or path/to/file.py:Config",
    )
    add_model_options(train)
    add_dtype(train)
    train.add_argument("--out", metavar="DIR", help="run folder (default: a new one under runs/)")
    train.add_argument("--images", type=positive, metavar="N", help="use N images of --data")
    train.add_argument("--seed", type=seed, default=0, metavar="S", help="default: 0")
    train.add_argument("--resume", action="store_true", help="go on with the run in --out")
    train.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting; repeatable",
    )
    train.add_argument(
        "--list-settings", action="store_true", help="print what --set can change, and exit"
    )


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status, 130 after Ctrl-C."""
    config = find_system(args.system or SHOWN).config
    if args.list_settings:
        print(settings_help(config))
        return 0
    from agents.training import train

    done = train(
        args.system,
        model=args.model,
        weights=args.weights,
        data=args.data,
        out=args.out,
        images=args.images,
        seed=args.seed,
        device=args.device,
        dtype=args.dtype,
        preprocessing=preprocessing(args),
        resume=args.resume,
        **_settings(config, args.settings),
    )
    return INTERRUPTED if done.stopped else 0


def _settings(config: type[SystemConfig], words: list[str]) -> dict[str, Any]:
    """Values by name from the words of ``--set``.

    Raises:
        UserError: a word that is not ``key=value``, an unknown key, or a value of another type.
    """
    values: dict[str, Any] = {}
    for setting in words:
        key, sep, text = setting.partition("=")
        if not sep:
            raise UserError(f"--set {setting}: the form is key=value")
        try:
            values |= read_settings(config, {key: text})
        except UserError as error:
            raise UserError(f"--set {error}") from error
    return values
