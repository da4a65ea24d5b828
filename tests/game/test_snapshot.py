"""A restored game goes on bit for bit as the game did, and shares tensors that nobody writes."""

import copy
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from helpers import same, small
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenenv import UserError, build_game
from tokenenv.game.episode import EXECUTIONS, Episode

RULES = ("token_prune", "layer_merge", "layer_prune")
BATCH = 3


def new_game(rules, execution="packed", **kwargs):
    options = small(rules=rules, execution=execution, batch_size=BATCH, max_cycles=3)
    return build_game(**options, privileged=True, **kwargs)


def play(game, seed: int, steps: int) -> list:
    """All that ``steps`` random decisions give; a new episode begins where one has ended."""
    generator, seen = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        if game.episode is None or game.episode.done:
            seen.append(vars(game.reset()))
            seen.append({"index": game.index, "dense": game.dense})
        shape = (BATCH, game.agents)
        turn = game.step(torch.randint(game.actions, shape, generator=generator))
        seen.append({"reward": turn.reward, "done": turn.done, "counts": game.counts})
        if turn.observation is not None:
            seen.append(vars(turn.observation))
        if turn.outcome is not None:
            seen.append({"logits": turn.outcome.logits, "labels": turn.outcome.labels})
    return seen


def tensors(value, seen: set[int]) -> list[torch.Tensor]:
    """All tensors of a game's state, in its episode and what that holds, too."""
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, list | tuple):
        parts = list(value)
    elif is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name) for field in fields(value)]
    elif isinstance(value, Episode) or type(value).__name__ in ("Stream", "DenseAnswers"):
        parts = [v for k, v in vars(value).items() if k not in ("backbone", "source")]
    else:
        return []
    return [tensor for part in parts for tensor in tensors(part, seen)]


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("rules", RULES)
@settings(max_examples=4, deadline=None)
@given(before=st.integers(0, 4), after=st.integers(1, 5), seed=st.integers(0, 99))
def test_restored_game_repeats_itself(rules, execution, before, after, seed) -> None:
    game = new_game(rules, execution)
    game.seed(seed)
    play(game, seed, before)  # 0: before the first episode; 3: after the end of one
    snapshot = game.snapshot()
    state = {k: v for k, v in snapshot.values.items() if k not in ("backbone", "source")}
    shared = tensors(state, set())
    assert before == 0 or len(shared) > 10
    values = [tensor.clone() for tensor in shared]
    first = play(game, seed + 1, after)
    game.restore(snapshot)
    play(game, seed + 2, 4)  # another future, with other images
    game.restore(snapshot)
    assert same(first, play(game, seed + 1, after))
    for tensor, value in zip(shared, values, strict=True):
        assert torch.equal(tensor, value), "a shared tensor was written in place"


def test_a_snapshot_restores_into_another_game_of_the_same_kind() -> None:
    one, other = new_game("layer_merge"), new_game("layer_merge")
    play(one, 0, 1)
    other.restore(one.snapshot())
    assert same(play(one, 1, 4), play(other, 1, 4))


def test_the_reward_comes_back_and_the_callback_stays() -> None:
    game, calls = new_game("token_prune"), []
    snapshot = game.snapshot()
    reward = game.reward
    game.reward, game.on_reset = copy.copy(reward), calls.append
    game.restore(snapshot)
    game.reset()
    assert game.reward is reward and calls == [BATCH]


def test_a_snapshot_of_another_game_is_refused() -> None:
    game = new_game("layer_merge")
    with pytest.raises(UserError, match="another rules"):
        game.restore(new_game("layer_prune").snapshot())
    with pytest.raises(UserError, match="another execution"):
        game.restore(new_game("layer_merge", "masked").snapshot())
    fewer = replace(game.rules, blocks=game.rules.blocks[:2])
    with pytest.raises(UserError, match="another rules"):
        game.restore(build_game(**small(rules=fewer, batch_size=BATCH)).snapshot())


def test_dense_outputs_learned_later_are_forgotten() -> None:
    # Their rounding depends on which images shared a batch, so that they would change the replay.
    game = new_game("layer_merge")
    play(game, 0, 1)
    snapshot, known = game.snapshot(), len(game.answers)
    play(game, 0, 4)
    assert len(game.answers) > known
    game.restore(snapshot)
    assert len(game.answers) == known
