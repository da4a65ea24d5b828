"""ToMe beside its published form, written out."""

from __future__ import annotations

import pytest
import torch
from test_backbone import family_model, image_for
from torch.testing import assert_close

from agents.policies.words import parse_policy
from tokenenv.game.episode import EXECUTIONS
from tokenenv.game.policy import play
from tokenenv.vit.backbone import Backbone


def published_tome(backbone: Backbone, images: torch.Tensor, r: int) -> torch.Tensor:
    """ToMe token by token, split and laid out as its published code does: ``(B, classes)``."""
    model, x = backbone.model, backbone.embed(images).x
    batch, prefix = len(x), backbone.prefix
    size = torch.ones(batch, x.shape[1], 1)
    for block in model.blocks:
        attn, h = block.attn, block.norm1(x)
        qkv = attn.qkv(h).reshape(batch, -1, 3, attn.num_heads, attn.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        score = q @ k.transpose(2, 3) * attn.head_dim**-0.5 + size.log()[:, None, None, :, 0]
        x = x + block.ls1(attn.proj((score.softmax(-1) @ v).transpose(1, 2).flatten(2)))
        unit = torch.nn.functional.normalize(k.mean(1), dim=-1)
        new_x, new_size = [], []
        for i in range(batch):
            one, two = list(range(0, x.shape[1], 2)), list(range(1, x.shape[1], 2))
            found = []
            for a in one:
                for b in two:
                    if a >= prefix and b >= prefix:
                        found.append((float(unit[i, a] @ unit[i, b]), a, b))
            best = {a: max(row for row in found if row[1] == a) for a in one if a >= prefix}
            chosen = sorted(best.values(), reverse=True)[: min(r, (x.shape[1] - prefix) // 2)]
            total = {n: size[i, n] * x[i, n] for n in range(x.shape[1])}
            count = {n: size[i, n] for n in range(x.shape[1])}
            for _, a, b in chosen:
                total[b], count[b] = total[b] + size[i, a] * x[i, a], count[b] + size[i, a]
            gone = {a for _, a, _ in chosen}
            left = [n for n in one if n not in gone]
            if not prefix:  # only with a class token does the published code sort them again
                left.sort(key=lambda n: -best[n][0])
            rest = left + two
            rest = sorted(n for n in rest if n < prefix) + [n for n in rest if n >= prefix]
            new_x.append(torch.stack([total[n] / count[n] for n in rest]))
            new_size.append(torch.stack([count[n] for n in rest]))
        x, size = torch.stack(new_x), torch.stack(new_size)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    x = model.norm(x)
    if not prefix:  # average pooling, in proportion to the sizes
        return model.head(model.fc_norm((x * size).sum(1) / size.sum(1)))
    return model.forward_head(x)


@pytest.mark.parametrize(
    "kind", ["deit", "distilled", "registers (DINOv2)", "average pooling, no class token"]
)
def test_tome_is_the_published_one(kind: str) -> None:
    backbone = family_model(kind)
    images = image_for(backbone, 3)
    with torch.inference_mode():
        expected = published_tome(backbone, images, 2)
        for execution in EXECUTIONS:
            found = play(backbone, parse_policy("tome:r=2", backbone.depth), images, execution)
            assert_close(found.logits, expected, atol=1e-4, rtol=0)
