"""``tokenenv train``: from options to a run folder."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from agents.judgement import Judgement, calibrate
from agents.plots import plot_history
from agents.policy import Trained
from agents.settings import with_settings
from agents.storage import write_json
from agents.systems import SYSTEMS, Config
from agents.training import Trainer
from tokenenv import metrics
from tokenenv.backbone import Backbone
from tokenenv.commands.common import (
    evaluate_with_bar,
    evaluation_json,
    in_words,
    open_backbone,
    print_result,
    report_skipped,
)
from tokenenv.commands.run_folder import (
    INTERRUPTED,
    POLICY,
    description,
    events,
    final_images,
    open_images,
    resumable,
    run_folder,
    versions,
)
from tokenenv.data import ImageSource
from tokenenv.errors import UserError
from tokenenv.game import Game
from tokenenv.models import EMBEDDED
from tokenenv.run_report import write_token_pictures


def train(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status, 130 after Ctrl-C."""
    system = SYSTEMS[args.system]()
    preset = system() if args.model not in (None, EMBEDDED) else system.for_digits()
    config = with_settings(preset, args.settings)
    with run_folder(args) as out, resumable(out):
        stopped = _train(args, config, out)
    return INTERRUPTED if stopped else 0


def _train(args: argparse.Namespace, config: Config, out: Path) -> bool:
    """Build everything, train, and report; whether Ctrl-C ended the training early."""
    backbone, name = open_backbone(args)
    source = open_images(args, backbone)
    fit, held_back = source.split(config.held_back, seed=args.seed)
    if config.batch > config.repeats * len(fit):
        raise UserError(
            f"batch={config.batch} takes {config.batch // config.repeats} images and there are "
            f"{len(fit)} to train on: use --set batch={config.repeats * len(fit)} or less"
        )
    torch.manual_seed(args.seed)
    game = config.game(backbone, fit)
    game.seed(args.seed)
    policy = config.policy(game, name)
    judge = _Judge(backbone, held_back)
    market = _Market(game, config, judge)
    trainer = Trainer(
        config.learner(policy, game, args.seed),
        market,
        market.judge,
        out,
        updates=config.updates,
        evaluate_every=config.evaluate_every,
        target_saving=config.target_saving,
        target_drop=config.target_drop,
        config=description(args, config, name, source),
    )
    if args.resume:
        trainer.resume()
    print(
        f"training {args.system} on {name}: {len(fit)} images of {source.name}, "
        f"{len(held_back)} held back to compare policies\n"
        f"{game.agents} agents, {game.steps} decisions, "
        f"{'in' if game.rules.between else 'before'} blocks "
        f"{', '.join(map(str, game.rules.blocks))}; Ctrl-C stops early and keeps the best policy"
    )
    _run_dense_model(game, judge)
    write_json(out / "config.json", {**trainer.config, "versions": versions()})
    with events(out, trainer) as log:
        trainer.run(log)
    report_skipped(source)
    _finish(trainer, policy, config, judge, final_images(args, backbone, held_back), out)
    return trainer.stopped


def _finish(
    trainer: Trainer,
    policy: Trained,
    config: Config,
    judge: _Judge,
    final: ImageSource,
    out: Path,
) -> None:
    """Keep the best policy, and write what the run folder promises."""
    assert trainer.best is not None
    policy.load_state_dict(trainer.best_state)
    found = trainer.best
    if config.calibrate:
        found = calibrate(policy, judge, config.target_saving, config.calibrate)
        print(
            f"threshold {policy.threshold:.2f} for {config.target_saving:g} % fewer MACs: "
            f"{in_words(found.saving, found.drop)} on the held-back images"
        )
        if abs(found.saving - config.target_saving) > 2:
            print(
                f"warning: {found.saving:.1f} % is far from the {config.target_saving:g} % wanted: "
                "the policy is hardly trained; give it more updates or images"
            )
    policy.save(out / POLICY)
    result = evaluate_with_bar(judge.backbone, policy, final)
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
    plot_history(out / "curve.png", trainer.history, config.target_saving)
    write_token_pictures(out / "tokens.png", judge.backbone, policy, final)
    print_result(final, result)
    if final is judge.source:
        print("  the policy was chosen on these images: evaluate it on others for a fair number")
    print(
        f"trained {trainer.done} updates in {tqdm.format_interval(trainer.seconds)}; "
        f"policy, report.json, curve.png and tokens.png are in {out}"
    )


class _Judge:
    """Measures a policy on held-back images whose dense predictions are known."""

    def __init__(self, backbone: Backbone, source: ImageSource) -> None:
        self.backbone, self.source = backbone, source
        self._dense = torch.zeros(len(source), dtype=torch.long)

    def prepare(self) -> Iterator[int]:
        """Predict with the dense model; yields images done."""
        for index in torch.arange(len(self.source)).split(64):
            batch = self.source.batch(index)
            if len(batch.index):
                images = batch.images.to(self.backbone.device, self.backbone.dtype)
                with torch.inference_mode():
                    self._dense[batch.index] = self.backbone(images).argmax(1).cpu()
            yield len(index)

    def __call__(self, policy: Trained) -> Judgement:
        """Saving, loss and drop of the deterministic policy."""
        found = metrics.evaluate(self.backbone, policy, self.source, dense=self._dense)
        return Judgement(found.saving, found.losses.mean().item(), found.drop)


class _Market:
    """What a game remembers between updates: the order of its images and a price, see the settings.

    With a closed loop every judgement sets a new price.
    """

    def __init__(self, game: Game, config: Config, judge: _Judge) -> None:
        self.game, self._config, self._judge = game, config, judge
        self._price = config.first_price

    def judge(self, policy: Trained) -> Judgement:
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


def _run_dense_model(game: Game, judge: _Judge) -> None:
    """Compute once what the untouched model says of every image."""
    total = len(game.source) + len(judge.source)
    with tqdm(total=total, unit="image", desc="dense model", leave=False, disable=None) as bar:
        for part in (game.prepare(), judge.prepare()):
            for done in part:
                bar.update(done)
    game.source.check_readable()
    judge.source.check_readable()
