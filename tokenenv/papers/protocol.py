"""What the protocol of a paper consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

TIERS = ("smoke", "small", "paper")
"""Minutes on embedded images; hours on a folder of photographs; the paper's own size."""

Part = Literal["paper", "ablation", "baseline"]

IMAGENET, IMAGENET_A, IMAGENET_C = "ImageNet-1K", "ImageNet-A", "ImageNet-C"


@dataclass(frozen=True)
class Claim:
    """Numbers of one method on one model, as a paper prints them.

    Attributes:
        method: the label of the row that they belong to.
        model: timm's name of the model.
        top1: percent.
        gflops: as printed, in the paper's own convention, see :attr:`Paper.flops`.
        images_per_s: throughput on the paper's machine.
        change: top-1 against the dense model, percentage points, if only that is printed.
        saved: share of the dense model's FLOPs saved, percent, if only that is printed.
        speedup: throughput over the dense model's, if only that is printed.
        data: the set of images.
    """

    method: str
    model: str
    top1: float | None = None
    gflops: float | None = None
    images_per_s: float | None = None
    change: float | None = None
    saved: float | None = None
    speedup: float | None = None
    data: str = IMAGENET

    def beside(self, dense: Claim | None) -> Claim:
        """The same, with what follows from the dense model's numbers filled in."""

        def known(given: float | None, mine: float | None, its: float | None) -> bool:
            return given is None and mine is not None and its is not None

        if dense is None:
            return self
        values: dict[str, Any] = dict(vars(self))
        if known(self.change, self.top1, dense.top1):
            values["change"] = self.top1 - dense.top1  # type: ignore[operator]
        if known(self.saved, self.gflops, dense.gflops):
            values["saved"] = 100 * (1 - self.gflops / dense.gflops)  # type: ignore[operator]
        if known(self.speedup, self.images_per_s, dense.images_per_s):
            values["speedup"] = self.images_per_s / dense.images_per_s  # type: ignore[operator]
        return Claim(**values)


@dataclass(frozen=True)
class Study:
    """What is trained: one system with its settings, once for each seed.

    Attributes:
        name: label of its row.
        system: name of the system, see ``tokenenv train``.
        settings: of all tiers and models.
        part: of the table.
        under: name of the study whose policy this one is fine-tuned under.
        keep_of: label of the baseline whose matched ``keep`` this one is trained with.
    """

    name: str
    system: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    part: Part = "paper"
    under: str = ""
    keep_of: str = ""


@dataclass(frozen=True)
class Baseline:
    """A method without training, and the knob that says how much it removes.

    Attributes:
        name: label of its row.
        word: its name in commands, with ``{}`` for the knob's value; without one it stands for the
            settings that a search finds, as of :data:`SEARCHED`.
        mildest, strongest: values of the knob, or with ``whole`` shares of the number of tokens.
        whole: whether the knob takes whole numbers; else it takes hundredths.
    """

    name: str
    word: str
    mildest: float = 0.99
    strongest: float = 0.1
    whole: bool = False

    def words(self, tokens: int) -> list[str]:
        """All settings, the mildest first, for a model of that many visual tokens."""
        scale = tokens if self.whole else 100
        first, last = (max(1, round(end * scale)) for end in (self.mildest, self.strongest))
        step = 1 if last >= first else -1
        values = range(first, last + step, step)
        return [self.word.format(v if self.whole else f"{v / 100:g}") for v in values]


SEARCHED = "diffrate"
"""The word of the baseline whose rates are searched for each model."""


@dataclass(frozen=True)
class Tier:
    """How much of a protocol is run.

    Attributes:
        models: timm's names, by default.
        seeds: how many, by default.
        ablation_seeds: at most so many of ablations.
        images: training images per run; None: all.
        limit: test images per set; None: all.
        parts: the parts of the table that are trained.
        settings: of each study by its name, over those of the study; ``""``: of all studies.
        batch: batch size of the timing.
        rounds: timings of each row.
        tries: training images on which baselines are matched, at most; None: all held back.
    """

    models: tuple[str, ...]
    seeds: int = 3
    ablation_seeds: int = 100
    images: int | None = None
    limit: int | None = None
    parts: tuple[Part, ...] = ("paper", "baseline", "ablation")
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    batch: int = 64
    rounds: int = 5
    tries: int | None = None

    def seeds_of(self, study: Study, asked: int) -> range:
        """The seeds of a study if ``asked`` were asked for."""
        return range(min(asked, self.ablation_seeds) if study.part == "ablation" else asked)

    def settings_of(self, study: Study) -> dict[str, Any]:
        """The settings that a study is trained with."""
        return {**self.settings.get("", {}), **study.settings, **self.settings.get(study.name, {})}


@dataclass(frozen=True)
class Paper:
    """A paper's protocol and its own numbers.

    Attributes:
        name: as in commands.
        title: with authors and number.
        flops: what the paper counts as a FLOP, in words.
        match: baselines are set so that they reach the ``top1`` of the paper's method on held-back
            training images, or so that they save as many ``macs`` there.
        studies: what is trained; the first is the paper's method.
        baselines: methods without training.
        claims: the paper's numbers; the rows of the dense models have the method ``dense``.
        tiers: by name.
        notes: what differs from the paper, and what it doesn't say, a sentence each.
    """

    name: str
    title: str
    flops: str
    match: Literal["top1", "macs"]
    studies: tuple[Study, ...]
    baselines: tuple[Baseline, ...]
    claims: tuple[Claim, ...]
    tiers: Mapping[str, Tier]
    notes: tuple[str, ...] = ()

    @property
    def method(self) -> Study:
        """The paper's own method."""
        return self.studies[0]

    def claims_on(self, data: str, model: str) -> list[Claim]:
        """The paper's numbers on a set, of this model or else of the first one it has there."""
        there = [claim for claim in self.claims if claim.data == data]
        plain = model.split(".")[0]
        own = [claim for claim in there if claim.model.split(".")[0] == plain]
        chosen = own or [claim for claim in there if claim.model == there[0].model]
        dense = next((claim for claim in chosen if claim.method == DENSE), None)
        return [claim.beside(dense) for claim in chosen]


DENSE = "dense"
"""Label of the row of the unreduced model, as in comparisons."""
