"""Patches are conserved, merging is a weighted mean, matching agrees with brute force."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from tokenenv.vit import packing, reduction
from tokenenv.vit.tokens import Tokens

shapes = st.tuples(
    st.integers(1, 3), st.integers(0, 2), st.integers(2, 12), st.integers(0, 2**31 - 1)
)


def make(batch: int, prefix: int, patches: int, seed: int) -> tuple[Tokens, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, prefix + patches, 4, generator=generator, dtype=torch.float64)
    return Tokens.start(x, prefix), generator


def coin(shape: tuple[int, ...], generator: torch.Generator, p: float = 0.5) -> torch.Tensor:
    return torch.rand(shape, generator=generator) < p


def check_invariants(tokens: Tokens, pruned: torch.Tensor) -> None:
    """``pruned (B, P)``: exactly those read -1; every other patch names one living token."""
    assert torch.equal(tokens.source < 0, pruned)
    owner = tokens.source.clamp(min=0)
    assert (tokens.alive.gather(1, owner) | pruned).all()
    assert ((owner >= tokens.prefix) | pruned).all()
    assert (tokens.alive[:, : tokens.prefix]).all()
    # A token's size is the number of patches that name it.
    counted = torch.zeros_like(tokens.size).scatter_add(1, owner, (~pruned).to(tokens.size.dtype))
    assert torch.equal(
        torch.where(tokens.alive, tokens.size, 0.0)[:, tokens.prefix :],
        counted[:, tokens.prefix :],
    )
    assert (tokens.size[~tokens.alive] == 0).all()


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_pruning_and_compacting_conserve_patches(shape: tuple[int, int, int, int]) -> None:
    tokens, generator = make(*shape)
    batch, prefix, patches, _ = shape
    pruned = torch.zeros(batch, patches, dtype=torch.bool)
    first = tokens
    for _ in range(3):
        votes = coin((batch, patches), generator)
        wanted = pruned | ~votes
        if prefix == 0:  # an image that would lose everything keeps what it has
            wanted = torch.where(wanted.all(1, keepdim=True), pruned, wanted)
        tokens = reduction.prune(tokens, tokens.from_patches(votes))
        pruned = wanted
        check_invariants(tokens, pruned)
        tokens = packing.compact(tokens)
        check_invariants(tokens, pruned)
        assert torch.equal(tokens.patch_alive(), ~pruned)
        assert tokens.x.shape[1] == int((~pruned).sum(1).max()) + prefix
        # Every living patch still has its own embedding, in its own place.
        back = tokens.to_patches(tokens.visual)
        assert torch.equal(back[~pruned], first.visual[~pruned])
        assert (back[pruned] == 0).all()


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_merging_conserves_patches_and_the_weighted_sum(shape: tuple[int, int, int, int]) -> None:
    tokens, generator = make(*shape)
    start = tokens
    nobody = torch.zeros_like(tokens.source, dtype=torch.bool)
    for _ in range(4):
        match = reduction.bipartite_match(tokens, tokens.x)
        tokens = reduction.merge(tokens, match, coin(match.score.shape, generator))
        check_invariants(tokens, nobody)
        # Each token is the mean of the patches it stands for.
        owner = tokens.source[..., None].expand(-1, -1, 4)
        total = torch.zeros_like(tokens.x).scatter_add(1, owner, start.visual)
        mean = (total / tokens.size[..., None].clamp(min=1)).double()
        alive = tokens.visual_alive
        assert_close(tokens.visual[alive], mean[:, tokens.prefix :][alive], atol=1e-6, rtol=1e-6)
        tokens = packing.compact(tokens)
        check_invariants(tokens, nobody)


@settings(max_examples=40, deadline=None)
@given(shapes)
def test_matching_agrees_with_brute_force(shape: tuple[int, int, int, int]) -> None:
    tokens, generator = make(*shape)
    batch, prefix, patches, _ = shape
    votes = coin((batch, patches), generator, 0.7)
    tokens = reduction.prune(tokens, votes)
    match = reduction.bipartite_match(tokens, tokens.x)
    for b in range(batch):
        living = [j for j in range(prefix, prefix + patches) if tokens.alive[b, j]]
        assert match.token[b].tolist()[: len(living[::2])] == living[::2]
        for token, partner, score in zip(
            match.token[b], match.partner[b], match.score[b], strict=True
        ):
            rivals = {
                j: torch.cosine_similarity(tokens.x[b, token], tokens.x[b, j], dim=0).item()
                for j in living[1::2]
                if tokens.alive[b, token]
            }
            if not rivals:
                assert score == -torch.inf
                continue
            assert abs(score.item() - max(rivals.values())) < 1e-5
            assert abs(rivals[int(partner)] - max(rivals.values())) < 1e-5


def test_strongest_takes_the_most_similar_pairs() -> None:
    tokens, _ = make(2, 1, 9, 3)
    match = reduction.bipartite_match(tokens, tokens.x)
    chosen = reduction.strongest(match, 2)
    for scores, mask in zip(match.score, chosen, strict=True):
        assert set(scores[mask].tolist()) == set(sorted(scores.tolist())[-2:])
    assert int(reduction.merge(tokens, match, chosen).alive.sum(1)[0]) == 10 - 2


def test_weights_other_than_size() -> None:
    tokens = Tokens.start(torch.tensor([[[1.0], [5.0]]]), prefix=0)
    match = reduction.bipartite_match(tokens, tokens.x)
    merged = reduction.merge(
        tokens, match, torch.ones(1, 1, dtype=torch.bool), torch.tensor([[3.0, 1.0]])
    )
    assert merged.x[0, 1, 0] == 2.0
    assert merged.size.tolist() == [[0.0, 2.0]]


def test_no_image_is_a_batch_too() -> None:
    tokens, generator = make(3, 1, 6, seed=0)
    tokens = reduction.prune(tokens, coin((3, 6), generator))
    none = tokens.select(torch.zeros(0, dtype=torch.long))
    for layout in (packing.compact, packing.pack):
        assert packing.unpack(layout(none)).x.shape == (0, 7, 4)
