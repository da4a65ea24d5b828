"""``tokenenv train``: from options to a run folder; ``torchrun`` starts it on many."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from agents.policies.trainable import Trainable
from agents.systems.registry import SYSTEMS, Config
from agents.training.held_back import HeldBack
from agents.training.judgement import Judge, Judgement, calibrate
from agents.training.plots import plot_history
from agents.training.run_folder import (
    POLICY,
    description,
    events,
    final_images,
    launch,
    open_images,
    versions,
)
from agents.training.trainer import Trainer
from agents.workers import Workers
from tokenenv.cli.common import (
    evaluate_with_bar,
    evaluation_json,
    in_words,
    open_backbone,
    print_result,
    report_skipped,
)
from tokenenv.data import ImageSource
from tokenenv.errors import UserError
from tokenenv.game import Game
from tokenenv.measure.token_pictures import write_token_pictures
from tokenenv.storage import write_json


def train(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status, 130 after Ctrl-C."""
    return launch(args, SYSTEMS[args.system](), _build, _train)


@dataclasses.dataclass
class _Run:
    """What every process builds.

    Attributes:
        config: the settings.
        name: of the model.
        source: all training images; ``fit``: those to train on.
        policy: what is trained, in ``game``, by ``trainer``.
        judge: measures it on the others.
    """

    config: Config
    name: str
    source: ImageSource
    fit: ImageSource
    game: Game
    policy: Trainable
    judge: HeldBack
    trainer: Trainer


def _build(args: argparse.Namespace, config: Config, workers: Workers, out: Path) -> _Run:
    backbone, name = open_backbone(args)
    source = open_images(args, backbone)
    fit, held_back = source.split(config.held_back, seed=args.seed)
    if config.batch % config.repeats:
        more = -(-config.batch // config.repeats) * config.repeats
        raise UserError(
            f"batch={config.batch} holds each image repeats={config.repeats} times, which doesn't "
            f"divide it: use --set batch={more}"
        )
    if config.batch < config.repeats * workers.count:
        raise UserError(
            f"batch={config.batch} with repeats={config.repeats} has too few images for "
            f"{workers.count} processes to share: use --set "
            f"batch={config.repeats * workers.count} or more, or fewer processes"
        )
    if config.batch > config.repeats * len(fit):
        raise UserError(
            f"batch={config.batch} takes {config.batch // config.repeats} images and there are "
            f"{len(fit)} to train on: use --set batch={config.repeats * len(fit)} or less"
        )
    torch.manual_seed(args.seed)
    game = config.game(backbone, fit)
    game.share(workers.rank, workers.count, args.seed)
    policy = config.policy(game, name)
    judge = HeldBack(backbone, held_back, workers)
    market = _Market(game, config, judge)
    trainer = Trainer(
        config.learner(policy, game, args.seed, workers),
        market,
        market.judge,
        out,
        updates=config.updates,
        evaluate_every=config.evaluate_every,
        target_saving=config.target_saving,
        target_drop=config.target_drop,
        config=description(args, config, name, source),
        workers=workers,
    )
    if args.resume:
        trainer.resume()
    return _Run(config, name, source, fit, game, policy, judge, trainer)


def _train(args: argparse.Namespace, run: _Run, out: Path) -> None:
    """Train and report."""
    trainer, game, judge = run.trainer, run.game, run.judge
    workers = trainer.workers
    count = f", {workers.count} processes" if workers.count > 1 else ""
    print(
        f"training {args.system} on {run.name}: {len(run.fit)} images of {run.source.name}, "
        f"{len(judge.source)} held back to compare policies{count}\n"
        f"{game.agents} agents, {game.steps} decisions, "
        f"{'in' if game.rules.between else 'before'} blocks "
        f"{', '.join(map(str, game.rules.blocks))}; Ctrl-C stops early and keeps the best policy"
    )
    _run_dense_model(game, judge, workers)
    if not workers.rank:
        write_json(out / "config.json", {**trainer.config, "versions": versions()})
    with events(out, trainer) as log:
        trainer.run(log)
    found = _choose(run)
    if workers.rank:
        return
    report_skipped(run.source)
    _finish(run, found, final_images(args, run.game.backbone, judge.source), out)


def _choose(run: _Run) -> Judgement:
    """Take the best policy, and set its threshold; how good it is."""
    policy, trainer, config = run.policy, run.trainer, run.config
    assert trainer.best is not None
    policy.load_state_dict(trainer.best_state)
    if not config.calibrate:
        return trainer.best
    found = calibrate(policy, run.judge, config.target_saving, config.calibrate)
    print(
        f"threshold {policy.threshold:.2f} for {config.target_saving:g} % fewer MACs: "
        f"{in_words(found.saving, found.drop)} on the held-back images"
    )
    if abs(found.saving - config.target_saving) > 2:
        print(
            f"warning: {found.saving:.1f} % is far from the {config.target_saving:g} % wanted: "
            "the policy is hardly trained; give it more updates or images"
        )
    return found


def _finish(run: _Run, found: Judgement, final: ImageSource, out: Path) -> None:
    """Write what the run folder promises."""
    policy, trainer, judge = run.policy, run.trainer, run.judge
    policy.save(out / POLICY)
    result = evaluate_with_bar(run.game.backbone, policy, final)
    report = {
        **evaluation_json(trainer.config["model"], final, result),
        "updates": trainer.done,
        "stopped_early": trainer.stopped,
        "training_seconds": round(trainer.seconds, 1),
        "held_back": dataclasses.asdict(found),
        "evaluated_on_held_back": final is judge.source,
        "threshold": policy.threshold,
        "frozen_backbone": True,
        "macs": "GMACs per image, policy included; 1 MAC = 1 FLOP",
        "history": trainer.history,
    }
    write_json(out / "report.json", report)
    plot_history(out / "curve.png", trainer.history, run.config.target_saving)
    write_token_pictures(out / "tokens.png", run.game.backbone, policy, final)
    print_result(final, result)
    if final is judge.source:
        print("  the policy was chosen on these images: evaluate it on others for a fair number")
    print(
        f"trained {trainer.done} updates in {tqdm.format_interval(trainer.seconds)}; "
        f"policy, report.json, curve.png and tokens.png are in {out}"
    )


class _Market:
    """What a game remembers between updates: the order of its images and a price, see the settings.

    With a closed loop every judgement sets a new price.
    """

    def __init__(self, game: Game, config: Config, judge: Judge) -> None:
        self.game, self._config, self._judge = game, config, judge
        self._price = config.first_price

    def judge(self, policy: Trainable) -> Judgement:
        """Judge, and let the price follow."""
        found = self._judge(policy)
        self._set(self._config.next_price(self._price, found))
        return found

    def _set(self, price: float) -> None:
        self._price = price
        self._config.set_price(self.game, price)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers."""
        return {"stream": self.game.stream.state_dict(), "price": self._price}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.game.stream.load_state_dict(state["stream"])
        self._set(state["price"])


def _run_dense_model(game: Game, judge: HeldBack, workers: Workers) -> None:
    """Compute once what the untouched model says of every image; all processes learn of all."""
    total = len(game.source) // workers.count + len(judge)
    with tqdm(total=total, unit="image", desc="dense model", leave=False, disable=None) as bar:
        for part in (game.prepare(), judge.prepare()):
            for done in part:
                bar.update(done)
    if workers.count > 1:
        for unreadable, found in workers.gather((game.source.unreadable, game.answers.export())):
            game.source.unreadable.update(unreadable)
            game.answers.add(*found)
    game.source.check_readable()
    judge.source.check_readable()
