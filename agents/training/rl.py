"""Training of a policy by reinforcement learning on a frozen backbone."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from agents.policies import POLICY
from agents.systems.base import PolicyConfig
from agents.training.held_back import HeldBack
from agents.training.judgement import Judgement, calibrate
from agents.training.plots import CURVE, plot_history
from agents.training.priced_game import PricedGame
from agents.training.request import Request
from agents.training.run import REPORT, Run
from agents.training.run_folder import events, progress_json, write_config
from agents.training.trainer import Trainer
from agents.workers import Workers
from tokenenv.artefact import FAULTS, read_object
from tokenenv.data import ImageSource
from tokenenv.errors import UserError
from tokenenv.game import Game
from tokenenv.game.cost import Cost
from tokenenv.game.latency import TimeCost, cost_from_json, cost_to_json, time_cost
from tokenenv.measure.printing import (
    evaluate_with_bar,
    evaluation_json,
    print_result,
    report_skipped,
    saving_in_words,
)
from tokenenv.measure.token_pictures import PICTURE, write_token_pictures
from tokenenv.measure.watching import BEFORE_AFTER, write_before_after
from tokenenv.storage import write_json
from tokenenv.vit.backbone import Backbone

LATENCY = "latency.json"
"""The file of a run folder with the predicted times of a run with ``cost=time``."""

UNTRAINED = "untrained"
"""The folder in a run folder with the policy before training, set for the same saving."""


class PolicyTraining:
    """A training run of a policy. Every process builds one; only the first writes the report.

    Args:
        request: the arguments of ``train``.
        config: the settings of the system.
        workers: the processes that train together.
        out: run folder.

    Raises:
        UserError: the settings don't fit the model, the images or the number of processes.
    """

    def __init__(self, request: Request, config: PolicyConfig, workers: Workers, out: Path) -> None:
        self.request, self.config, self.workers, self.out = request, config, workers, out
        self.backbone = request.model.open_backbone(request.data)
        self.source = request.training_images(self.backbone)
        self.fit, held_back = request.divide(self.source)
        check_batch(config, len(self.fit), workers.count)
        torch.manual_seed(request.seed)
        self.game = config.game(self.backbone, self.fit)
        self.game.share(workers.rank, workers.count, request.seed, workers.union)
        # A resumed run has to compute what the run before it would have.
        self.game.answers.kept = False
        self.policy = config.policy(self.game, request.model.name)
        self.start = copy.deepcopy(self.policy)
        self.cost = training_cost(
            config, self.backbone, self.policy, out, workers, resume=request.resume
        )
        if self.cost is not None:
            check_reachable(config, self.cost, self.game)
            computation = self.cost.computation(self.game.rules)
            self.game.reward = self.game.reward.priced_by(computation)
        self.judge = HeldBack(self.backbone, held_back, workers, self.cost)
        priced = PricedGame(self.game, config, self.judge)
        learner: Any = config.learner(self.policy, self.game, request.seed, workers)
        self.trainer = Trainer(
            learner,
            priced,
            priced.judge,
            out,
            updates=config.updates,
            evaluate_every=config.evaluate_every,
            target_saving=config.target_saving,
            target_drop=config.allowed_drop,
            saved=(self.cost or Cost).word,
            most_seconds=60 * config.minutes or math.inf,
            config=request.description(self.source),
            after_update=request.after_update,
            workers=workers,
        )
        if request.resume:
            self.trainer.resume()

    def run(self) -> Run:
        """Train, choose the best policy and its threshold, and report."""
        self._print_start()
        self.judge.prepare()
        config = write_config(self.out, self.request, self.trainer)
        with events(self.out, self.trainer) as log:
            self.trainer.run(log)
        found = self._choose()
        before = self._calibrate_start(found)
        if self.workers.rank:
            return Run(self.out, config, trust=True)
        report_skipped(self.source)
        final = self.request.final_images(self.backbone, self.judge.source)
        report = self._report(found, before, final)
        return Run(self.out, config, report, trust=True)  # its code has run here

    def _print_start(self) -> None:
        """Print system, model, images and decision blocks."""
        game, judge, count = self.game, self.judge, self.workers.count
        together = f", {count} processes" if count > 1 else ""
        print(
            f"training {self.request.system.name} on {self.request.model.name}: {len(self.fit)} "
            f"images of {self.source.name}, {len(judge.source)} held back to compare policies"
            f"{together}\n"
            f"{game.agents} agents, {game.steps} decisions, "
            f"{'in' if game.rules.between else 'before'} blocks "
            f"{', '.join(map(str, game.rules.blocks))}; Ctrl-C stops early and keeps the best "
            "policy"
        )

    def _choose(self) -> Judgement:
        """Restore the best policy and set its threshold; returns how it was judged."""
        policy, config = self.policy, self.config
        assert self.trainer.best is not None
        policy.load_state_dict(self.trainer.best_state)
        if not config.calibrate:
            return self.trainer.best
        found = calibrate(policy, self.judge, config.target_saving, config.calibrate)
        print(
            f"threshold {policy.threshold:.2f} for {config.target_saving:g} % {self._words}: "
            f"{saving_in_words(found.saving, found.drop, self._words)} on the held-back images"
        )
        if abs(found.saving - config.target_saving) > 2:
            print(
                f"warning: {found.saving:.1f} % is far from the {config.target_saving:g} % wanted: "
                "the policy is hardly trained; give it more updates or images"
            )
        return found

    def _calibrate_start(self, found: Judgement) -> Judgement:
        """Set the threshold of the untrained policy so that it saves as much as the trained one.

        Args:
            found: how the trained policy was judged.

        Returns:
            How the untrained one was. With ``calibrate=0`` its threshold stays as it is.
        """
        if not self.config.calibrate:
            return self.judge(self.start)
        return calibrate(self.start, self.judge, found.saving, self.config.calibrate)

    @property
    def _words(self) -> str:
        return (self.cost or Cost).saved_words

    def _report(self, found: Judgement, before: Judgement, final: ImageSource) -> dict[str, Any]:
        """Write policy, report and pictures, print the result, and return the report.

        Args:
            found: how the trained policy was judged.
            before: how the untrained one was.
            final: the images of the report.
        """
        out, trainer, policy = self.out, self.trainer, self.policy
        policy.save(out / POLICY)
        self.start.save(out / UNTRAINED / POLICY)
        result = evaluate_with_bar(self.backbone, policy, final, cost=self.cost)
        dense = torch.zeros(len(final), dtype=torch.long)
        dense[result.index] = result.dense
        start = evaluate_with_bar(self.backbone, self.start, final, dense=dense)
        untrained = {name: start.report()[name] for name in ("top1", "gmacs")}
        on_held_back = final is self.judge.source
        report = {
            **evaluation_json(self.request.model.name, final, result),
            **progress_json(trainer, found),
            "evaluated_on_held_back": on_held_back,
            "threshold": policy.threshold,
            "untrained": untrained,
            "frozen_backbone": True,
            **({} if self.cost is None else {"predicted_for": self.cost.table.key}),
        }
        write_json(out / REPORT, report)
        plot_history(
            out / CURVE,
            trainer.history,
            self.config.target_saving,
            title=f"{self.request.system.name} on {self.request.model.name}, seed "
            f"{self.request.seed}",
            untrained=before,
            saved=(self.cost or Cost).word,
        )
        write_token_pictures(out / PICTURE, self.backbone, policy, final)
        write_before_after(out / BEFORE_AFTER, self.backbone, self.start, policy, self.judge.source)
        print_result(final, result)
        print(
            f"  untrained, at about the same cost: top-1 {untrained['top1']:.2f} %, "
            f"{untrained['gmacs']:.4f} GMACs/image"
        )
        if on_held_back:
            print(
                "  the policy was chosen on these images: evaluate it on others for a fair number"
            )
        print(
            f"trained {trainer.done} updates in {tqdm.format_interval(trainer.seconds)}; "
            f"policy, {REPORT}, {CURVE}, {PICTURE} and {BEFORE_AFTER} are in {out}"
        )
        return report


def check_reachable(config: PolicyConfig, cost: TimeCost, game: Game) -> None:
    """Raise :class:`UserError` if the decisions take more time than they could ever save."""
    most = cost.most_saved(game.rules)
    if most < config.target_saving and not config.allowed_drop:
        raise UserError(
            f"target_saving={config.target_saving:g} % of the time can't be reached at "
            f"cost_batch={config.cost_batch}: with every token removed it would be {most:.0f} %, "
            "as the decisions take time, too; name fewer blocks (--set blocks=3/6/9), or a larger "
            "cost_batch"
        )


def training_cost(
    config: PolicyConfig,
    backbone: Backbone,
    policy: Any,
    out: Path,
    workers: Workers,
    *,
    resume: bool,
) -> TimeCost | None:
    """The predicted times that a run is judged by; None for a run judged by multiply-adds.

    The first process measures them, and the run folder keeps them: a resumed run goes on with the
    same.

    Raises:
        UserError: a resumed run's file is missing or damaged.
    """
    if config.cost == "macs":
        return None
    path = out / LATENCY
    if resume:
        remedy = "restore it, or start a new run"
        found = read_object(path, {"table": dict, "decisions": dict}, remedy)
        try:
            return cost_from_json(backbone, found)
        except FAULTS as error:
            raise UserError(f"cannot read '{path}' ({error}): {remedy}") from None
    made: dict[str, Any] = {}
    if not workers.rank:
        made = cost_to_json(time_cost(backbone, policy, config.cost_batch))
        write_json(path, made)
    return cost_from_json(backbone, workers.gather(made)[0])


def check_batch(config: PolicyConfig, images: int, processes: int) -> None:
    """Raise :class:`UserError` unless ``batch`` images can be drawn and shared.

    Args:
        config: the settings of the system.
        images: number of images to train on.
        processes: number of processes that train together.
    """
    batch, repeats = config.batch, config.repeats
    if batch % repeats:
        raise UserError(
            f"batch={batch} holds each image repeats={repeats} times, which doesn't divide it: "
            f"use --set batch={-(-batch // repeats) * repeats}"
        )
    if batch < repeats * processes:
        raise UserError(
            f"batch={batch} with repeats={repeats} has too few images for {processes} processes to "
            f"share: use --set batch={repeats * processes} or more, or fewer processes"
        )
    if batch > repeats * images:
        raise UserError(
            f"batch={batch} takes {batch // repeats} images and there are {images} to train on: "
            f"use --set batch={repeats * images} or less"
        )
