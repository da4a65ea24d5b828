"""What training adds to DORA: the untrained initial policy at the same cost.

    python benchmarks/untrained_start.py dora-strict-deit_tiny --data imagenet/train --out untrained
    tokenenv evaluate untrained --data imagenet/val --json untrained.json
    tokenenv evaluate dora-strict-deit_tiny --data imagenet/val --json trained.json
    python benchmarks/compare.py trained.json untrained.json

The threshold of the untrained policy is set so that its saving equals that of the trained policy on
the same training images.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import agents
from agents.policies.words import folder_of
from agents.systems.dora import DoraConfig
from agents.systems.registry import settings_of
from agents.training.held_back import HeldBack
from agents.training.judgement import calibrate
from tokenenv import load_backbone, open_source
from tokenenv.cli.options import positive
from tokenenv.errors import UserError, run_script

TRIES = 9  # thresholds


def as_trained(what: str) -> DoraConfig:
    """The settings with which the run was started."""
    folder = folder_of(what)
    path = folder and folder / "config.json"
    said = json.loads(path.read_text()) if path and path.is_file() else {}
    if said.get("system") != "dora":
        raise UserError(f"'{what}' is no run of dora with its config.json: give one, or a shipped")
    config = settings_of(said)
    assert isinstance(config, DoraConfig)
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trained", help="a run of dora, or the name of a shipped one")
    parser.add_argument("--weights", help="a file; default: timm's download")
    parser.add_argument("--data", required=True, help="training images")
    parser.add_argument("--images", type=positive, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    trained = agents.load(args.trained)
    config = as_trained(args.trained)
    backbone = load_backbone(trained.trained_on, args.weights)
    source = open_source(args.data, backbone.model, split="train", limit=args.images)
    judge = HeldBack(backbone, source)
    wanted = judge(trained).saving
    torch.manual_seed(args.seed)
    start = config.policy(config.game(backbone, source), trained.trained_on)

    found = calibrate(start, judge, wanted, TRIES)
    args.out.mkdir(parents=True, exist_ok=True)
    start.save(args.out / "policy.safetensors")
    print(f"saving {found.saving:.1f} %, wanted {wanted:.1f} %: threshold {start.threshold:.3f}")


if __name__ == "__main__":
    run_script(main)
