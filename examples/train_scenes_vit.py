"""Train ``scenes_vit``, the embedded backbone for generated scenes, within an hour on 2 cores.

    python examples/train_scenes_vit.py --out weights.safetensors

No image is seen twice. No token is dropped in training, so what is removed later matters. Two
things make the model learn from fewer images: the first steps are on squares cut from the scenes
around their digit, and every token in the middle of the network is asked which digit it shows, or
none. The last steps are on whole scenes, and the weight of that question falls to zero before the
end. Hidden matrices learn by Muon, which takes torch 2.9.

Settings were chosen on scenes of the validation glyphs. The test scenes are used once, at the end,
for the accuracy in the file. ``--checkpoint FILE`` keeps the state, and goes on from it.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import tokenenv.vit.scenes  # registers scenes_vit
from tokenenv.data.pixels import Preprocess
from tokenenv.data.scenes import COUNTS, SIDE, Scenes, scenes
from tokenenv.data.splits import Split

FIRST = 2**24  # number of the first scene of training, far behind those that policies learn from
ASKED = 5  # the block after which tokens are asked
NONE = 10  # the answer of a token without ink
WARM_UP = 0.08  # of all steps
EVERY = 50  # steps between two lines and checkpoints
PATCH = 4  # pixels
CUT = 32  # side of the squares that training starts with, pixels
SMALL = 0.7  # the share of the steps on them


class Trainee(nn.Module):
    """The model, and the layer that is asked about tokens, which is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model("scenes_vit", drop_path_rate=0.02)
        self.asked = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, NONE + 1))

    def forward(self, images: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(B, 10)`` of the class, and ``(B, N, 11)`` of the tokens.

        Args:
            images: ``(B, 1, H, W)`` cut from scenes.
            place: ``(B, N)`` the tokens' places in the whole scene, row by row.
        """
        model = self.model
        x = model.patch_embed.proj(images).flatten(2).transpose(1, 2)
        x = x + model.pos_embed[0, 1:][place]
        first = (model.cls_token + model.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([first, x], 1)
        answers = x
        for number, block in enumerate(model.blocks):
            x = block(x)
            if number == ASKED:
                answers = self.asked(x[:, 1:])
        return model.forward_head(model.norm(x)), answers


def cut(drawn: Scenes, side: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A square of ``side`` pixels of each scene that holds most of its digit.

    Returns:
        Its pixels ``(B, 1, side, side)`` uint8, those of the ink, and the places of its tokens in
        the whole scene ``(B, N)``.
    """
    ink, line = drawn.ink[:, 0].float(), torch.arange(SIDE) + 0.5
    mass = ink.sum((1, 2))
    corner = []  # row, column
    for along in (2, 1):
        middle = (ink.sum(along) * line).sum(1) / mass
        moved = (torch.rand(len(ink), generator=rng) - 0.5) * side / 4
        corner.append(
            ((middle + moved - side / 2) / PATCH).round().clamp(0, (SIDE - side) // PATCH)
        )
    top, left = (part.long()[:, None] for part in corner)
    line = torch.arange(side)
    rows, columns = (top * PATCH + line)[:, :, None], (left * PATCH + line)[:, None, :]
    image = torch.arange(len(ink))[:, None, None]
    line = torch.arange(side // PATCH)
    place = ((top + line)[:, :, None] * (SIDE // PATCH) + (left + line)[:, None, :]).flatten(1)
    return (
        drawn.images[:, 0][image, rows, columns][:, None],
        drawn.ink[:, 0][image, rows, columns][:, None],
        place,
    )


def answers_of(ink: Tensor, labels: Tensor) -> Tensor:
    """``(B, N)`` the digit of each token with ink, else :data:`NONE`."""
    share = F.avg_pool2d(ink.float() / 255, PATCH).flatten(1)
    return torch.where(share > 0.15, labels[:, None], NONE)


def optimisers(trainee: Trainee, rate: float) -> list[torch.optim.Optimizer]:
    """Muon (torch 2.9) for the matrices of the blocks, AdamW for all else."""
    hidden = [p for p in trainee.model.blocks.parameters() if p.ndim == 2]
    known = {id(p) for p in hidden}
    others = [p for p in trainee.parameters() if id(p) not in known]
    return [
        torch.optim.Muon(hidden, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_at(step: int, steps: int, highest: float) -> float:
    """The learning rate: half a cosine up from a 25th of the highest, half a cosine down to 0."""
    rise = WARM_UP * steps
    if step < rise:
        return highest * (1 - 0.48 * (1 + math.cos(math.pi * step / rise)))
    return highest * 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def train(args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(args.seed)
    trainee = Trainee()
    optimise = optimisers(trainee, args.rate)
    parts = {"trainee": [trainee], "optimisers": optimise}
    done, before = restore(args.checkpoint, parts)
    normalise = Preprocess(trainee.model).normalise
    start, right = time.monotonic(), 0.0
    for step in range(done, args.steps):
        side = CUT if step < SMALL * args.steps else SIDE
        rng = torch.Generator().manual_seed(args.seed * 2**20 + step)
        drawn = scenes("train", args.batch, FIRST + step * args.batch)
        pixels, ink, place = cut(drawn, side, rng)
        logits, answers = trainee(normalise(list(pixels)), place)
        loss = F.cross_entropy(logits, drawn.labels, label_smoothing=0.05)
        weight = 2 * max(0.0, 1 - step / (0.8 * args.steps))
        about = answers_of(ink, drawn.labels)
        asked = F.cross_entropy(answers.flatten(0, 1), about.flatten())
        for each in optimise:
            each.zero_grad()
            for group in each.param_groups:
                group["lr"] = rate_at(step, args.steps, args.rate)
        (loss + weight * asked).backward()
        nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        for each in optimise:
            each.step()
        right += (logits.argmax(1) == drawn.labels).float().mean().item() / EVERY
        if (step + 1) % EVERY == 0 or step + 1 == args.steps:
            seconds = before + time.monotonic() - start
            print(
                f"step {step + 1}/{args.steps}  loss {loss:.3f}  asked {asked:.3f}  "
                f"top-1 {right:.3f}  {seconds:.0f} s",
                flush=True,
            )
            right = 0.0
            keep(args.checkpoint, parts, step + 1, seconds)
    return trainee.model.eval()


def keep(path: Path | None, parts: dict[str, list[Any]], done: int, seconds: float) -> None:
    """Write the checkpoint, if one is wanted."""
    if path is not None:
        state = {name: [one.state_dict() for one in some] for name, some in parts.items()}
        torch.save({**state, "done": done, "seconds": seconds}, path)


def restore(path: Path | None, parts: dict[str, list[Any]]) -> tuple[int, float]:
    """Steps and seconds of the checkpoint, which is loaded; zeros if there is none."""
    if path is None or not path.is_file():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    for name, some in parts.items():
        for one, saved in zip(some, state[name], strict=True):
            one.load_state_dict(saved)
    return state["done"], state["seconds"]


@torch.inference_mode()
def accuracy(model: nn.Module, split: Split) -> float:
    drawn = scenes(split, COUNTS[split])
    images = Preprocess(model).normalise(list(drawn.images))
    found = torch.cat([model(part).argmax(1) for part in images.split(250)])
    return (found == drawn.labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=tokenenv.vit.scenes.WEIGHTS)
    parser.add_argument("--steps", type=int, default=920)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, help="a file to keep the state in, and go on")
    parser.add_argument("--validate", action="store_true", help="compare choices, save nothing")
    args = parser.parse_args()

    model = train(args)
    print(
        f"accuracy on {COUNTS['validation']} validation scenes: {accuracy(model, 'validation'):.4f}"
    )
    if args.validate:
        return
    halves = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: tensor.float() for name, tensor in halves.items()})
    test = accuracy(model, "test")
    command = shlex.join(["python", "examples/train_scenes_vit.py", *sys.argv[1:]])
    about = {"test_accuracy": f"{test:.4f}", "seed": str(args.seed), "command": command}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(halves, args.out, metadata=about)
    print(f"wrote {args.out} ({args.out.stat().st_size} bytes): {about}")


if __name__ == "__main__":
    main()
