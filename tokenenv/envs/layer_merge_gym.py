"""The merging game for a single agent: one decision in each block."""

from __future__ import annotations

from typing import ClassVar

from tokenenv.envs.gym_base import GameEnv


class LayerMergeEnv(GameEnv):
    """
    ## Description

    An image passes through a frozen Vision Transformer. In every block, between attention and
    MLP, similar visual tokens may be merged: ToMe's bipartite matching proposes pairs, and the
    agent chooses how many of them, or which, are merged. A merged token is the mean of the pair,
    weighted by the number of patches that each stands for. At the end the model classifies the
    image from the tokens left. The agent learns in which blocks an image can be merged, and how
    much. The game is that of DORA (He et al., arXiv 2605.11683), of whose text only the abstract
    is public; the rest is our reading. {mod}`tokenenv.envs.layer_pettingzoo` has one agent per
    block.

    By default the model is the packaged `digits_vit` on scikit-learn's digits, 8x8 pixels with one
    token each: `P = 64`, 12 blocks, a decision in each. It needs no network.

    ## Action Space

    With `action="count"` (default) `Discrete(len(grid))`: how many pairs are merged, the most
    similar first.

    | Value | Meaning |
    |---|---|
    | 0 | none |
    | i | `grid[i]` pairs; by default 2, 4, 8, 12, 16, 24, 32 for i = 1 to 7 |

    With `action="pairs"` `MultiDiscrete([2] * A)`: one number per candidate pair,
    `A = ceil(P / 2)` of them. Once tokens are merged there are fewer pairs, and the last slots are
    inactive.

    | Value | Meaning |
    |---|---|
    | 0 | keep the two |
    | 1 | merge them |

    A count of more pairs than there are, and merging in an inactive slot, is illegal: it is
    replaced by 0 and counted in `info["illegal_actions"]`. `action_masks()` returns the legal
    actions in the form that sb3-contrib's MaskablePPO reads.

    ## Observation Space

    `K` is the number of decisions. All numbers are dimensionless, and zero at the end of an
    episode. Cosines c are given as `(c - 0.9) / 0.05`, because those of similar tokens differ
    little.

    With `action="count"` `Box(-inf, inf, (F + G,), float32)`, `F = len(grid)`, `G = K + 3`:

    | Num | Observation | Min | Max |
    |---|---|---|---|
    | 1 | cosine of the most similar pair's keys | -38 | 2 |
    | F - 1 | the same of the last pair that each further choice merges; 0 if absent | -38 | 2 |
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
    | 2 | `size`: log of the number of patches each stands for | 0 | log P |
    | 1 | `token`: cosine of the embeddings | -38 | 2 |
    | 1 | `token`: log ratio of the embeddings' norms | -inf | inf |
    | 2 H | `keys`: mean-head keys of both, head width H (not by default) | -inf | inf |
    | K + 3 | decision and history, as above | 0 | 1 |

    ## Rewards

    `"dora"`, after each decision: `efficiency * dC - penalty * (g(d) - g(d'))`, where `d'` is `d`
    after the decision before, 0 for the first decision.

    - `dC = k / P * (L - l) / L` for `k` pairs merged in block `l` of the model's `L`. Merging early
      counts more; removing all tokens before block 0 would be 1.
    - `damage="divergence"` (default): `d = tau^2 KL(dense, reduced)` of the predictions at
      temperature `tau`, if no later decision removed anything; `g(d) = d`, or `d + d^2 / bend`.
    - `damage="drift"` saves the forward pass that this takes: `d = 1 - cos` between the summary
      tokens of the reduced and the dense model at the next decision, `g(d) = exp(kappa d) - 1`; at
      the end `penalty * tau^2 KL(dense, reduced)` is subtracted, too.

    The defaults `efficiency=25, penalty=30, damage="divergence", tau=3, kappa=10, bend=0` and
    `terminal=False` (`True`: the whole penalty at the end) can be changed with `reward_kwargs`.
    `reward` also takes any function of a {class}`tokenenv.game.rewards.Turn`.

    ## Starting State

    The next image of the data set, with a token for every patch, at the first decision. Images
    come in a random order, another one in every epoch; `reset(seed=...)` restarts it.

    `reset(options=...)` names the image instead, for one episode:

    | Option | Meaning |
    |---|---|
    | `index` | its position in the data set, from 0 |
    | `label` | its class: the next image of it, those before it are passed over |
    | `file` | its name in the data set, as in `env.unwrapped.game.source.files` |

    An unknown option is an error. A vector environment takes one value for all images or a list.

    ## Episode End

    1. Termination: the last decision was taken, and the image is classified. An episode always
       has `max_cycles` steps.

    There is no truncation; a `max_episode_steps` that would cut an episode is refused.

    ## Info

    The same keys from reset on.

    | Key | Meaning | Range |
    |---|---|---|
    | `active_mask` | which slots hold a pair (not with `"count"`) | bool `(A,)` |
    | `tokens_left` | visual tokens left | int in 1 to P |
    | `illegal_actions` | illegal actions in this episode | int from 0 |
    | `correct` | whether the reduced model predicts the true class; False before the end | bool |
    | `dense_correct` | whether the dense model predicts it; False before the end | bool |

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
    | `proportional` | **bool** | `True` | a merged token counts in attention as all its patches |
    | `share` | **bool** | `True` | whether to observe the decision and the history |
    | `shuffle` | **bool** | `False` | split and order tokens as ToMe's published code does |
    | `reward` | **str** or Reward | `"dora"` | see Rewards, or a function of a Turn |
    | `reward_kwargs` | **dict** | `None` | parameters of a reward given by name |
    | `device` | **str** | `"cpu"` | where to put a model given by name |
    | `dtype` | **str** | `"float32"` | its precision: also `"bfloat16"`, `"float16"` |
    | `execution` | **str** | `None` | `"masked"`, `"padded"`, `"packed"`; None: by device |
    | `render_mode` | **str** | `None` | `"human"` (a window), `"rgb_array"`, `"ansi"` |

    ## Vectorized environment

    One batched game, no processes:

    ```python
    >>> envs = gym.make_vec("tokenenv/LayerMerge-v0", num_envs=4)
    >>> envs
    LayerMergeVectorEnv(tokenenv/LayerMerge-v0, num_envs=4)

    ```

    See {class}`tokenenv.envs.layer_vector.LayerMergeVectorEnv`. stable-baselines3 takes
    {class}`tokenenv.envs.sb3.SB3VecEnv`. An `AsyncVectorEnv` of single environments works too.
    Its workers are forked, and use one thread each, if `tokenenv` was imported before;
    on a GPU they need `context="spawn"`.

    ## Version History

    * v0: initial version
    """

    rules: ClassVar[str] = "layer_merge"
