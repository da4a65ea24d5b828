"""LTM on the embedded digits: fine-tuned as the dense model is, with the IB bound in its loss.

    OMP_NUM_THREADS=1 python examples/ltm_digits.py
    OMP_NUM_THREADS=1 python examples/ltm_digits.py --eta 0    # without the bound

For each seed the dense model and LTM start from the packaged ``digits_vit`` and see the same
batches; LTM's loss has the bound's label term from 30 % of the training on. The bound is measured
on test images, which no statistics have seen.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from train_digits_vit import accuracy, augment

import tokenenv.embedded  # noqa: F401  (registers digits_vit)
from tokenenv import ltm
from tokenenv.data import ImageSource, Stream, open_source
from tokenenv.ltm.bound import Report

BATCH = 64
PEAK_RATE = 5e-4
CLASSES = 10


def batches(source: ImageSource) -> Iterator[tuple[Tensor, Tensor]]:
    for index in torch.arange(len(source)).split(256):
        batch = source.batch(index)
        yield batch.images, batch.labels


def finetune(
    model: nn.Module, source: ImageSource, epochs: int, seed: int, eta: float = 0.0
) -> nn.Module:
    """Cross-entropy, and from 30 % on the bound's label term; statistics anew each epoch."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    per_epoch = len(source) // BATCH
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, PEAK_RATE, total_steps=epochs * per_epoch, pct_start=0.1, cycle_momentum=False
    )
    stream = Stream(source, BATCH, seed)
    bound = ltm.SeparableBound(model, CLASSES) if isinstance(model, ltm.LTM) else None
    for epoch in range(epochs):
        weight = ltm.label_weight(epoch / epochs, eta)
        if weight and bound is not None:
            bound.refresh(batches(source))
        model.train()
        for _ in range(per_epoch):
            batch = stream.next()
            images = augment(batch.images, rng)
            if weight and bound is not None:
                with bound.model.recording() as features:
                    logits = model(images)
                loss = weight * bound.loss(features, batch.labels)
            else:
                logits, loss = model(images), torch.zeros(())
            loss = loss + F.cross_entropy(logits, batch.labels, label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
    return model.eval()


def measured(model: ltm.LTM, train: ImageSource, test: ImageSource) -> Report:
    bound = ltm.SeparableBound(model, CLASSES)
    bound.refresh(batches(train))
    return bound.report(batches(test))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--ratio", type=float, default=0.64)
    parser.add_argument("--mask", choices=("attention", "linear"), default="attention")
    parser.add_argument("--eta", type=float, default=0.1, help="weight of the bound's label term")
    args = parser.parse_args()
    torch.set_num_threads(1)

    start = timm.create_model("digits_vit", pretrained=True)
    train = open_source("digits", start, split="train")
    test = open_source("digits", start, split="test")
    example = test.batch(torch.arange(1)).images
    dense_macs = ltm.measure(start, example)
    for seed in range(args.seeds):
        began = time.monotonic()
        dense = timm.create_model("digits_vit", pretrained=True)
        finetune(dense, train, args.epochs, seed)
        row = f"seed {seed}: dense {accuracy(dense, test):.2%}"
        torch.manual_seed(seed)
        model = ltm.ltm(start, args.ratio, args.mask).eval()
        before, first = measured(model, train, test), accuracy(model, test)
        finetune(model, train, args.epochs, seed, args.eta)
        after = measured(model, train, test)
        saved = 1 - ltm.measure(model, example) / dense_macs
        print(
            f"{row}, LTM {first:.2%} -> {accuracy(model, test):.2%}, MACs -{saved:.1%}, "
            f"IBB {before.bound:.3f} -> {after.bound:.3f}, IB {before.ib:.3f} -> {after.ib:.3f}, "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
