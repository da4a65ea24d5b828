"""Train ``digits_vit``, the embedded backbone, on the training part of scikit-learn's digits.

    python examples/train_digits_vit.py --hold-back 0.2      # compare choices, save nothing
    python examples/train_digits_vit.py --out weights.safetensors

Settings were chosen on held-back training images. The run that writes the weights trains on all
1197 images and uses the 600 test images once, at its end, for the accuracy in the file.

Each training step drops a random 0 to 30 % of the tokens, as regularisation; none at test time.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import tokenenv.vit.digits  # registers digits_vit
from tokenenv.data import Batch, ImageSource, Stream, open_source

BATCH = 64
PEAK_RATE = 2e-3
WARM_UP = 0.05  # of all steps
MOST_DROPPED = 0.3  # of the visual tokens


def augment(images: Tensor, rng: torch.Generator) -> Tensor:
    """Rotate, scale and shift ``(B, C, H, W)`` images slightly, and add noise."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(len(images), generator=rng) * (high - low) + low

    angle = uniform(-0.15, 0.15)  # radians
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0] = angle.cos() * uniform(0.92, 1.08)
    theta[:, 0, 1] = -angle.sin()
    theta[:, 1, 0] = angle.sin() + uniform(-0.08, 0.08)
    theta[:, 1, 1] = angle.cos() * uniform(0.92, 1.08)
    theta[:, :, 2] = torch.stack(
        [uniform(-0.15, 0.15), uniform(-0.15, 0.15)], 1
    )  # 0.25 is one pixel

    black = images.amin()
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images - black, grid, align_corners=False) + black
    return moved + 0.05 * torch.randn(images.shape, generator=rng)


def train(source: ImageSource, epochs: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    model = timm.create_model("digits_vit", patch_drop_rate=MOST_DROPPED, drop_path_rate=0.05)
    steps = epochs * len(source) // BATCH
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, PEAK_RATE, total_steps=steps, pct_start=WARM_UP, cycle_momentum=False
    )
    stream = Stream(source, BATCH, seed)
    start = time.monotonic()
    for step in range(steps):
        batch = stream.next()
        model.patch_drop.prob = MOST_DROPPED * torch.rand((), generator=rng).item()
        logits = model(augment(batch.images, rng))
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=0.1)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 200 == 0:
            print(
                f"step {step}/{steps}  loss {loss:.3f}  {time.monotonic() - start:.0f} s",
                flush=True,
            )
    return model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, source: ImageSource) -> float:
    everything: Batch = source.batch(torch.arange(len(source)))
    return (model(everything.images).argmax(1) == everything.labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=tokenenv.vit.digits.WEIGHTS)
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--hold-back", type=float, help="judge by this share of the training images"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)

    model = timm.create_model("digits_vit")
    source = open_source("digits", model, split="train")
    if args.hold_back:
        source, held = source.split(args.hold_back, seed=args.seed)
        model = train(source, args.epochs, args.seed)
        print(f"held-back accuracy {accuracy(model, held):.4f} on {len(held)} training images")
        return

    model = train(source, args.epochs, args.seed)
    test = accuracy(model, open_source("digits", model, split="test"))
    command = shlex.join(["python", "examples/train_digits_vit.py", *sys.argv[1:]])
    about = {"test_accuracy": f"{test:.4f}", "seed": str(args.seed), "command": command}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), args.out, metadata=about)
    print(f"wrote {args.out} ({args.out.stat().st_size} bytes): {about}")


if __name__ == "__main__":
    main()
