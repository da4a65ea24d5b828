"""The single-agent face of the merging game: one decision for each block."""

from __future__ import annotations

from typing import ClassVar

from tokenenv.envs.single import GameEnv


class LayerMergeEnv(GameEnv):
    """
    ## Description

    An image passes through a frozen Vision Transformer. In every block, between attention and
    MLP, similar visual tokens may be merged: ToMe's bipartite matching proposes pairs, and the
    agent says how many of them, or which, become one token, their mean weighted by the patches
    each stands for. At the end the model classifies the image from the tokens left. To be decided
    is where an image bears how much of it. The game is that of DORA (He et al., arXiv
    2605.11683), of whose text only the abstract is public: the rest is our reading. With an agent
    per block: {mod}`tokenenv.envs.layer`.

    By default the model is the packaged `digits_vit` on scikit-learn's digits, 8x8 pixels with one
    token each: `P = 64`, 12 blocks, a decision in each. It needs no network.

    ## Action Space

    With `action="count"` (default) `Discrete(len(grid))`: how many pairs merge, the most similar
    first.

    | Value | Meaning |
    |---|---|
    | 0 | none |
    | i | `grid[i]` pairs; by default 2, 4, 8, 12, 16, 24, 32 for i = 1 to 7 |

    With `action="pairs"` `MultiDiscrete([2] * A)`: one number per candidate pair,
    `A = ceil(P / 2)` of them. Fewer tokens make fewer pairs; the slots behind them are not active.

    | Value | Meaning |
    |---|---|
    | 0 | keep the two |
    | 1 | merge them |

    A count of more pairs than there are, and merging in a slot that is not active, is illegal:
    0 is played instead, which is counted in `info["illegal_actions"]`. `action_masks()` tells what
    is legal, in the form that sb3-contrib's MaskablePPO reads.

    ## Observation Space

    `K` is the number of decisions. No number has a unit; all are zero at the end of an episode.
    Cosines c are given as `(c - 0.9) / 0.05`: those of similar tokens are close to each other.

    With `action="count"` `Box(-inf, inf, (F + G,), float32)`, `F = len(grid)`, `G = K + 3`:

    | Num | Observation | Min | Max |
    |---|---|---|---|
    | 1 | cosine of the most similar pair's keys | -38 | 2 |
    | F - 1 | the same of the last pair of each further choice; 0 if there are fewer | -38 | 2 |
    | K | which decision it is, one-hot | 0 | 1 |
    | 1 | share of tokens left | 0 | 1 |
    | 1 | share of these that the last decision removed | 0 | 1 |
    | 1 | decisions so far that removed something, over decisions so far plus one | 0 | 1 |

    With `action="pairs"` `Box(-inf, inf, (A, F + G), float32)`: one row per candidate pair, zeros
    for a slot that is not active. `features` chooses the first ones and their order; the last four
    lines are as above.

    | Num | Observation | Min | Max |
    |---|---|---|---|
    | 1 | `similarity`: cosine of the keys of the two | -38 | 2 |
    | 1 | `similarity`: the same less its mean over the candidates | -40 | 40 |
    | 2 | `cls_attention`: log of the class token's attention to each over its mean | -4 | log P |
    | 2 | `size`: log of the patches each stands for | 0 | log P |
    | 1 | `token`: cosine of the embeddings | -38 | 2 |
    | 1 | `token`: log ratio of their lengths | -inf | inf |
    | 2 H | `keys`: mean-head keys of both, head width H (not by default) | -inf | inf |
    | K + 3 | decision and history, as above | 0 | 1 |

    ## Rewards

    `"dora"`, after each decision: `efficiency * dC - penalty * (g(d) - g(d'))`, with
    `d'` that of the decision before, at first 0.

    - `dC = k / P * (L - l) / L` for `k` tokens merged away in block `l` of the model's `L`: earlier
      is more, all at once before block 0 would be 1.
    - `damage="divergence"` (default): `d = tau^2 KL(dense, reduced)` of the predictions at
      temperature `tau`, if nobody decided anything from here on; `g(d) = d`, or `d + d^2 / bend`.
    - `damage="drift"`, without that further forward pass: `d = 1 - cos` of the summary token to
      the dense model's at the next decision, `g(d) = exp(kappa d) - 1`; at the end
      `tau^2 KL(dense, reduced)` in addition.

    The defaults `efficiency=25, penalty=30, damage="divergence", tau=3, kappa=10, bend=0` and
    `terminal=False` (`True`: the whole penalty at the end) can be changed with `reward_kwargs`.
    `reward` also takes any function of a turn, see {class}`tokenenv.game.rewards.Turn`.

    ## Starting State

    The next image of the data set, with a token for every patch, at the first decision. Images
    come in an endless shuffled order; without a seed it starts at random; `reset(seed=...)`
    starts it anew, and every epoch has another one.

    ## Episode End

    1. Termination: the last decision was taken, and the image is classified. An episode has
       always `max_cycles` steps.

    There is no truncation.

    ## Info

    The same keys from reset on.

    | Key | Meaning | Range |
    |---|---|---|
    | `active_mask` | which pairs there are (not with `"count"`) | bool `(A,)` |
    | `tokens_left` | visual tokens left | int in 1 to P |
    | `illegal_actions` | illegal actions in this episode | int from 0 |
    | `correct` | whether the reduced model names the true class, False until the end | bool |
    | `dense_correct` | whether the dense model does, False until the end | bool |

    ## Arguments

    ```python
    >>> import gymnasium as gym
    >>> import tokenenv
    >>> env = gym.make("tokenenv/LayerMerge-v0", max_cycles=2)
    >>> observation, info = env.reset(seed=0)
    >>> env.action_space, observation.shape, info["tokens_left"]
    (Discrete(8), (13,), 64)
    >>> _, reward, terminated, truncated, info = env.step(3)
    >>> terminated, info["tokens_left"]
    (False, 56)

    ```

    | Parameter | Type | Default | Description |
    |---|---|---|---|
    | `model` | **str** or Backbone | `"digits_vit"` | timm model name, or a ready backbone |
    | `weights` | **str** | `None` | file of weights for a model given by name |
    | `data` | **str** or ImageSource | `None` | folder or data set name; None: the digits |
    | `split` | **str** | `"train"` | part of the data: `"train"` or `"test"` |
    | `blocks` | **tuple** | `None` | decision blocks; None: `max_cycles`, spread evenly |
    | `max_cycles` | **int** | `None` | number of decisions; None: that of `blocks`, or all |
    | `action` | **str** | `"count"` | `"count"` or `"pairs"` |
    | `grid` | **tuple** | (0, 2, 4, 8, 12, 16, 24, 32) | pairs for each choice of `"count"` |
    | `features` | **tuple** | similarity, cls_attention, size, token | of `"pairs"`, see above |
    | `proportional` | **bool** | `True` | a merged token weighs in attention as its patches do |
    | `share` | **bool** | `True` | whether the last four lines of the observation are there |
    | `shuffle` | **bool** | `False` | split and lay out tokens as ToMe's published code does |
    | `reward` | **str** or Reward | `"dora"` | see Rewards, or any function of a turn |
    | `reward_kwargs` | **dict** | `None` | parameters of a reward given by name |
    | `device` | **str** | `"cpu"` | where to put a model given by name |
    | `dtype` | **str** | `"float32"` | what it computes in: also `"bfloat16"`, `"float16"` |
    | `execution` | **str** | `None` | `"masked"`, `"padded"`, `"packed"`; None: by device |
    | `render_mode` | **str** | `None` | `"human"` (printed), `"rgb_array"`, `"ansi"` |

    ## Vectorized environment

    One batched game, no processes:

    ```python
    >>> envs = gym.make_vec("tokenenv/LayerMerge-v0", num_envs=4)
    >>> envs
    LayerMergeVectorEnv(tokenenv/LayerMerge-v0, num_envs=4)

    ```

    See {class}`tokenenv.envs.layer_vector.LayerMergeVectorEnv`. stable-baselines3 takes
    {class}`tokenenv.envs.sb3.SB3VecEnv`. An `AsyncVectorEnv` of single environments works too.
    Its workers are forked, and compute with one thread each, if `tokenenv` was imported before;
    on a GPU they need `context="spawn"`.

    ## Version History

    * v0: initial version
    """

    rules: ClassVar[str] = "layer_merge"
