"""The per-block pruning game for a single agent: one decision in each block."""

from __future__ import annotations

from typing import ClassVar

from tokenenv.envs.gym_base import GameEnv


class LayerPruneEnv(GameEnv):
    """
    ## Description

    An image passes through a frozen Vision Transformer. In every block, between attention and
    MLP, the agent chooses how many visual tokens are pruned, or which. They still take part in the
    block's attention and are then removed for good; at least four always stay. At the end the
    model classifies the image from the tokens left. The agent learns in which blocks an image can
    be pruned, and how much. The game is that of DORA-pruning (arXiv 2609.34325).
    {mod}`tokenenv.envs.layer_pettingzoo` has one agent per block.

    By default the model is the packaged `digits_vit` on scikit-learn's digits, 8x8 pixels with one
    token each: `P = 64`, 12 blocks, a decision in each. It needs no network.

    ## Action Space

    With `action="count"` (default) `Discrete(n)`, `n = (P - 4) // budget_step + 1`: how many tokens
    are pruned. `selector` ranks the tokens.

    | Value | Meaning |
    |---|---|
    | 0 | none |
    | i | `i * budget_step` tokens; by default 2 to 60 for i = 1 to 30 |

    With `action="tokens"` `MultiDiscrete([2] * P)`: one number per token, row by row from the top
    left of the image. An action that would leave fewer than four tokens prunes none.

    | Value | Meaning |
    |---|---|
    | 0 | prune |
    | 1 | keep |

    Illegal are: a count that would leave fewer than four tokens, keeping a token that was pruned
    before, and, once only four are left, keeping any. An illegal action is replaced by 0, which
    changes nothing then, and counted in `info["illegal_actions"]`. `action_masks()` returns the
    legal actions in the form that sb3-contrib's MaskablePPO reads.

    ## Observation Space

    `W` is the width of the keys of all heads together (usually the model's width), `K` the number
    of decisions. All numbers are dimensionless, and zero at the end of an episode.

    With `action="count"` `Box(-inf, inf, (F + G,), float32)`, `F = 0`, `G = W + K + 3`:

    | Num | Observation | Min | Max |
    |---|---|---|---|
    | W | key of the class token (without one: mean of the keys of tokens left) | -inf | inf |
    | K | which decision it is, one-hot | 0 | 1 |
    | 1 | share of tokens left | 0 | 1 |
    | 1 | share of these that the last decision removed | 0 | 1 |
    | 1 | decisions so far that removed something, over decisions so far plus one | 0 | 1 |

    With `action="tokens"` `Box(-inf, inf, (P, F + G), float32)`: one row per token, zeros for one
    that is not active. `features` chooses the first ones and their order.

    | Num | Observation | Min | Max |
    |---|---|---|---|
    | W | `keys`: the token's key | -inf | inf |
    | 1 | `cls_attention`: log of its attention over the mean (not by default) | -4 | log P |
    | 1 | `redundancy`: cosine with a more attended token's key (not by default) | -1 | 1 |
    | W + K + 3 | class token's key, decision and history, as above | -inf | inf |

    ## Rewards

    `"dora"`, after each decision: `efficiency * dC - penalty * (g(d) - g(d'))`, where `d'` is `d`
    after the decision before, 0 for the first decision.

    - `dC = k / P * (L - l) / L` for `k` tokens pruned in block `l` of the model's `L`. Pruning
      early counts more; removing all tokens before block 0 would be 1.
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
    | `active_mask` | which tokens may be pruned (not with `"count"`) | bool `(P,)` |
    | `tokens_left` | visual tokens left | int in 4 to P |
    | `illegal_actions` | illegal actions in this episode | int from 0 |
    | `correct` | whether the reduced model predicts the true class; False before the end | bool |
    | `dense_correct` | whether the dense model predicts it; False before the end | bool |

    ## Arguments

    ```python
    >>> import gymnasium as gym
    >>> import tokenenv
    >>> env = gym.make("tokenenv/LayerPrune-v0", max_cycles=2)
    >>> observation, info = env.reset(seed=0)
    >>> env.action_space, info["tokens_left"]
    (Discrete(31), 64)
    >>> _, reward, terminated, truncated, info = env.step(4)
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
    | `action` | **str** | `"count"` | `"count"` or `"tokens"` |
    | `budget_step` | **int** | `2` | spacing of the choices of `"count"` |
    | `selector` | **str** | `"redundancy"` | prunes the highest; `"cls_attention"`: the lowest |
    | `features` | **tuple** | keys | of `"tokens"`, see above |
    | `reward` | **str** or Reward | `"dora"` | see Rewards, or a function of a Turn |
    | `reward_kwargs` | **dict** | `None` | parameters of a reward given by name |
    | `device` | **str** | `"cpu"` | where to put a model given by name |
    | `dtype` | **str** | `"float32"` | its precision: also `"bfloat16"`, `"float16"` |
    | `execution` | **str** | `None` | `"masked"`, `"padded"`, `"packed"`; None: by device |
    | `render_mode` | **str** | `None` | `"human"` (a window), `"rgb_array"`, `"ansi"` |

    ## Vectorized environment

    One batched game, no processes:

    ```python
    >>> envs = gym.make_vec("tokenenv/LayerPrune-v0", num_envs=4)
    >>> envs
    LayerPruneVectorEnv(tokenenv/LayerPrune-v0, num_envs=4)

    ```

    See {class}`tokenenv.envs.layer_vector.LayerPruneVectorEnv`. stable-baselines3 takes
    {class}`tokenenv.envs.sb3.SB3VecEnv`. An `AsyncVectorEnv` of single environments works too.
    Its workers are forked, and use one thread each, if `tokenenv` was imported before;
    on a GPU they need `context="spawn"`.

    ## Version History

    * v0: initial version
    """

    rules: ClassVar[str] = "layer_prune"
