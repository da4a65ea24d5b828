"""What is tried: methods at a few settings each, by the words that commands take.

The list is finite and each of its knobs is known to be monotone: fewer tokens are faster and lose
more. So there is nothing for a sampler of black-box search (Optuna's, say) to learn that the order
of the settings does not tell, its pruners are the successive halving of :mod:`tokenenv.tuning`, and
what is known is one JSON file that is written atomically.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from agents.policies import shipped
from agents.policies.words import parse_policy
from tokenenv.errors import UserError
from tokenenv.measure.candidate import MethodCandidate
from tokenenv.vit.backbone import Backbone

_KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)
"""Shares of the tokens that go on from a decision."""

_LEAST, _MOST = 0.25, 0.75
"""Shares of the tokens that all decisions of a method remove together: the range tried."""


def words_for(backbone: Backbone) -> list[str]:
    """The words to try on a model; some may not fit it."""
    plans = block_plans(backbone.depth)
    found = [f"resize:size={size}" for size in _sizes(backbone)]
    for name in ("cls-attention", "evit", "mstm", "zerotprune"):
        found += [f"{name}:keep={keep},{plan}" for plan, keep in _kept(plans, name)]
    patches = backbone.patches
    for share in (0.02, 0.03, 0.04, 0.05, 0.06, 0.07):
        r = max(1, round(share * patches))
        found += [f"tome:r={r},shuffle=0", f"tome:r={r}"]
    for plan in plans:
        for removed in _REMOVED:
            found += _merging(patches, plan, removed)
    found += list(_single(backbone))
    found += [f"merge-above:similarity={cosine}" for cosine in (0.95, 0.925, 0.9, 0.875, 0.85)]
    found += [f"pitome:keep={keep}" for keep in (0.975, 0.95, 0.925, 0.9)]
    found += [f"pitome:keep={keep},{plans[0]}" for keep in (0.8, 0.7, 0.6)]
    found += [f"ats:tokens={max(1, round(keep * patches))},{plans[0]}" for keep in (0.8, 0.65, 0.5)]
    for name in shipped():
        found += [name, *(f"{name}:threshold={threshold}" for threshold in (0.35, 0.65))]
    return list(dict.fromkeys(found))


def block_plans(depth: int) -> tuple[str, ...]:
    """Where methods decide: in one early block, a later one, two, or three blocks."""
    first, second = depth // 4, max(depth // 3, 1)
    plans = ((first,), (second,), (first, depth // 2), (first, depth // 2, 3 * depth // 4))
    return tuple("blocks=" + "/".join(map(str, sorted(set(plan)))) for plan in plans)


def _kept(plans: Iterable[str], name: str) -> Iterator[tuple[str, float]]:
    """Plans and shares kept at each of their decisions, so that a plausible share is left."""
    for plan in plans:
        for keep in _KEEPS:
            removed = 1 - keep ** len(plan.split("/"))
            if _LEAST <= removed <= _MOST and not (name == "zerotprune" and "/" in plan):
                yield plan, keep


_REMOVED = (0.3, 0.36, 0.42, 0.48, 0.54, 0.6)
"""Shares of the tokens that a few large decisions remove together."""


def _merging(patches: int, plan: str, removed: float) -> Iterator[str]:
    """ToMe with a few large decisions, of equal size or each two thirds of the one before."""
    count = len(plan.split("/"))
    for ratio in (1.0, 2 / 3)[: min(count, 2)]:
        parts = [ratio**i for i in range(count)]
        sizes = [max(1, round(removed * patches * part / sum(parts))) for part in parts]
        yield f"tome:r={'/'.join(map(str, sizes))},{plan},shuffle=0"


def _single(backbone: Backbone) -> Iterator[str]:
    """DiffRate with one decision, which is what pays at small batches, in one of the early blocks.

    More tokens are removed at once than the greedy search takes in a step, which can't tell what
    one large decision is worth from what the first tokens of it are.
    """
    for block in sorted({round(share * backbone.depth) for share in (0.17, 0.25, 0.33, 0.42)}):
        for removed in _REMOVED:
            for merged in (1.0, 0.7):
                total = round(removed * backbone.patches)
                merge = round(merged * total)
                yield f"diffrate:prune={total - merge},merge={merge},blocks={block}"


def _sizes(backbone: Backbone) -> list[int]:
    """Sides of smaller images, from about 93 % of the model's on."""
    patch, side = backbone.family.patch_size[0], backbone.image_shape[1]
    wanted = {max(1, round(share * side / patch)) * patch for share in (0.93, 0.86, 0.79, 0.71)}
    return sorted((size for size in wanted if size < side), reverse=True)


def fitting(words: Iterable[str], backbone: Backbone, model: str) -> list[MethodCandidate]:
    """The methods that fit a model; others, such as policies for another one, are left out.

    ``model``: timm's name of it.
    """
    found = []
    for word in words:
        try:
            method = parse_policy(word, backbone.depth)
            method.check_fit(backbone, model)
        except UserError:
            continue
        method = method.on(backbone.device)
        found.append(MethodCandidate(word, method, backbone, key=word, group=word.split(":")[0]))
    return found
