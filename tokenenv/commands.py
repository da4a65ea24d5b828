"""What the commands do: wires models, images, game, learner and report together."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from agents.plots import plot_history
from agents.policy import ActorPolicy
from agents.rl4evit import RL4EViTConfig, with_settings
from agents.spec import parse_policy
from agents.storage import read_tensors, write_json
from agents.training import CHECKPOINT, Judgement, Trainer, calibrate
from tokenenv import metrics
from tokenenv.backbone import Backbone
from tokenenv.data import ImageSource, open_source
from tokenenv.envs.build import build_game
from tokenenv.errors import UserError
from tokenenv.models import EMBEDDED, load_backbone
from tokenenv.run_report import write_token_pictures

MAC_NOTE = "GMACs per image, policy included; 1 MAC = 1 FLOP"


def train(args: argparse.Namespace) -> int:
    """``tokenenv train rl4evit``."""
    config = with_settings(RL4EViTConfig(), args.settings)
    out = _run_folder(args)
    backbone, name = _backbone(args)
    source = open_source(args.data, backbone.model, split="train", limit=args.images, seed=args.seed)
    fit, held_back = source.split(1 - config.held_back, seed=args.seed)
    torch.manual_seed(args.seed)
    game = build_game(
        model=backbone,
        data=fit,
        blocks=config.blocks or None,
        features=config.features,
        share=config.share,
        reward=config.reward,
        reward_kwargs=config.reward_kwargs(),
        batch_size=config.batch,
    )
    game.seed(args.seed)
    policy = config.policy(game, name)
    learner = config.learner(policy, game, args.seed)
    description = {
        "system": args.system,
        "model": name,
        "weights": args.weights,
        "data": source.name,
        "images": len(source),
        "seed": args.seed,
        **json.loads(json.dumps(dataclasses.asdict(config))),
    }
    judge = _Judge(backbone, held_back)
    writer = _Events(out)
    trainer = Trainer(
        learner,
        game.stream,
        judge,
        out,
        updates=config.updates,
        evaluate_every=config.evaluate_every,
        target_drop=config.target_drop,
        config=description,
        log=writer.add,
    )
    if args.resume:
        trainer.resume()
    write_json(out / "config.json", {**description, "versions": _versions()})
    print(
        f"training {args.system} on {name}: {len(fit)} images of {source.name}, "
        f"{len(held_back)} held back, {game.agents} agents, {game.steps} decisions -> {out}"
    )
    with tqdm(total=len(fit) + len(held_back), unit="image", desc="dense model") as bar:
        for part in (game.prepare(), judge.prepare()):
            for done in part:
                bar.update(done)
    trainer.run()
    writer.close()
    _report_skipped(source)
    _finish(trainer, policy, config, judge, args, out)
    return 0


def _finish(
    trainer: Trainer,
    policy: ActorPolicy,
    config: RL4EViTConfig,
    judge: _Judge,
    args: argparse.Namespace,
    out: Path,
) -> None:
    """Keep the best policy, and write what the run folder promises."""
    policy.load_state_dict(trainer.best_state)
    assert trainer.best is not None
    found = trainer.best
    if config.calibrate:
        found = calibrate(policy, judge, config.target_drop, config.calibrate)
    policy.save(out / "policy.safetensors")
    backbone, held_back = judge.backbone, judge.source
    # The embedded digits have images that nobody trains on; of a folder, the held-back part.
    final = open_source(None, backbone.model, split="test") if args.data is None else held_back
    result = metrics.evaluate(backbone, policy, final)
    report = {
        **_evaluation_json(trainer.config["model"], final, result),
        "updates": trainer.done,
        "stopped_early": trainer.stopped,
        "training_seconds": round(trainer.seconds, 1),
        "held_back": dataclasses.asdict(found),
        "threshold": policy.threshold,
        "frozen_backbone": True,
        "macs": MAC_NOTE,
        "history": trainer.history,
    }
    write_json(out / "report.json", report)
    plot_history(out / "curve.png", trainer.history, config.target_drop)
    write_token_pictures(out / "tokens.png", backbone, policy, final)
    _print_result(policy, final, result)
    print(f"trained {trainer.done} updates in {trainer.seconds:.0f} s; everything is in {out}")


class _Judge:
    """Measures a policy on held-back images whose dense predictions are known."""

    def __init__(self, backbone: Backbone, source: ImageSource) -> None:
        self.backbone, self.source = backbone, source
        self._dense = torch.zeros(len(source), dtype=torch.long)

    def prepare(self) -> Iterable[int]:
        """Predict with the dense model; yields images done."""
        for index in torch.arange(len(self.source)).split(64):
            batch = self.source.batch(index)
            images = batch.images.to(self.backbone.device, self.backbone.dtype)
            with torch.inference_mode():
                self._dense[batch.index] = self.backbone(images).argmax(1).cpu()
            yield len(index)

    def __call__(self, policy: ActorPolicy) -> Judgement:
        """Drop and saving of the deterministic policy."""
        found = metrics.evaluate(self.backbone, policy, self.source, dense=self._dense)
        return Judgement(drop=found.drop, saving=found.saving)


def evaluate(args: argparse.Namespace) -> int:
    """``tokenenv evaluate``."""
    trained = _trained_on(args.what)
    args.model = args.model or trained.get("model")
    args.weights = args.weights or trained.get("weights")
    backbone, name = _backbone(args)
    policy = parse_policy(args.what, backbone.depth)
    if isinstance(policy, ActorPolicy):
        rules = policy.rules
        rules.check(backbone)
        policy.check(rules.agent_dim(backbone), rules.shared_dim(backbone), name)
        policy.to(backbone.device)
    source = open_source(args.data, backbone.model, split="test", limit=args.limit)
    with tqdm(total=len(source), unit="image", desc=args.what, leave=False) as bar:
        result = metrics.evaluate(
            backbone,
            policy,
            source,
            batch_size=args.batch,
            restrict=args.restrict,
            progress=bar.update,
        )
    _report_skipped(source)
    report = {
        "what": args.what,
        **_evaluation_json(name, source, result),
        "macs": MAC_NOTE,
        "restricted": args.restrict,
        "predictions": [
            {"file": source.files[i], "label": label, "dense": dense, "reduced": reduced}
            for i, label, dense, reduced in zip(
                result.index.tolist(),
                result.labels.tolist(),
                result.dense.tolist(),
                result.reduced.tolist(),
                strict=True,
            )
        ],
    }
    if args.json:
        write_json(Path(args.json), report)
    _print_result(policy, source, result)
    return 0


def _backbone(args: argparse.Namespace) -> tuple[Backbone, str]:
    name = args.model or EMBEDDED
    if args.data is None and name != EMBEDDED:
        raise UserError(f"model '{name}' needs --data: a folder of class/image")
    return load_backbone(name, args.weights, args.device), name


def _run_folder(args: argparse.Namespace) -> Path:
    """The folder to write to: new and writable, or the one to resume."""
    if args.out:
        out = Path(args.out)
        if (out / CHECKPOINT).exists() and not args.resume:
            raise UserError(f"'{out}' already holds a run: add --resume, or choose another --out")
    else:
        if args.resume:
            raise UserError("--resume needs --out DIR: which run shall go on?")
        number = 0
        while (out := Path("runs") / f"{args.system}-{number}").exists():
            number += 1
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        raise UserError(f"cannot write to '{out}' ({error.strerror}): choose another --out") from None
    return out


def _trained_on(what: str) -> dict[str, Any]:
    """Model and weights of a run folder or a shipped policy; empty for a heuristic."""
    from agents.policy import SHIPPED, shipped

    folder = SHIPPED / what if what in shipped() else Path(what)
    config, policy = folder / "config.json", folder / "policy.safetensors"
    if config.is_file():
        try:
            found = json.loads(config.read_text())
            return {"model": found.get("model"), "weights": found.get("weights")}
        except (OSError, json.JSONDecodeError):
            raise UserError(f"'{config}' is not readable JSON: is the run complete?") from None
    if policy.is_file():
        return {"model": read_tensors(policy)[1].get("trained_on")}
    return {}


def _evaluation_json(model: str, source: ImageSource, result: metrics.Evaluation) -> dict[str, Any]:
    return {
        "model": model,
        "data": source.name,
        "skipped": len(source.skipped),
        **result.report(),
    }


def _print_result(policy: Any, source: ImageSource, result: metrics.Evaluation) -> None:
    r = result.report()
    print(f"{source.name}: {r['images']} images, frozen backbone ({MAC_NOTE})")
    print(f"  {'':10}{'top-1 %':>9}{'GMACs':>10}{'images/s':>10}")
    print(
        f"  {'dense':10}{r['top1_dense']:9.2f}{r['gmacs_dense']:10.4f}{r['images_per_s_dense']:10.1f}"
    )
    print(f"  {'reduced':10}{r['top1']:9.2f}{r['gmacs']:10.4f}{r['images_per_s']:10.1f}")
    print(
        f"  {result.saving:.1f} % fewer MACs, {result.drop:+.2f} pp top-1 lost, "
        f"{r['agreement']:.1f} % same prediction"
    )
    left = ", ".join(f"{r['tokens'][b]:.0f} from block {b}" for b in policy.rules.blocks)
    print(f"  visual tokens: {r['tokens'][0]:.0f}, then {left}")


def _report_skipped(source: ImageSource) -> None:
    if source.skipped:
        print(
            f"skipped {len(source.skipped)} unreadable images of {source.name}, "
            f"for example '{source.skipped[0]}'"
        )


def _versions() -> dict[str, str]:
    names = ("tokenenv", "torch", "timm", "gymnasium", "pettingzoo")
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except Exception:
            found[name] = "not installed"
    return {"python": platform.python_version(), **found}


class _Events:
    """TensorBoard events of a run."""

    def __init__(self, out: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(out))

    def add(self, update: int, numbers: dict[str, float]) -> None:
        """Write scalars."""
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, update)

    def close(self) -> None:
        """Flush."""
        self.writer.close()
