"""The token pruning game for a single agent: one joint action for all tokens."""

from __future__ import annotations

from typing import ClassVar

from tokenenv.envs.gym_base import GameEnv


class TokenPruneEnv(GameEnv):
    """
    ## Description

    An image passes through a frozen Vision Transformer. Before some of its blocks every visual
    token, one per image patch, is kept or pruned. A pruned token is removed from the computation
    for good: no later token attends to it. At the end the model classifies the image from the
    tokens left. The agent learns which tokens the model can do without. The game is that of
    RL4EViT (Lu et al., ICME 2025), where every token has an agent of its own
    ({mod}`tokenenv.envs.token_prune_pettingzoo`); here one agent decides about all tokens.

    By default the model is the packaged `digits_vit` on scikit-learn's digits, 8x8 pixels with one
    token each: `P = 64`, 12 blocks, decisions before blocks 3, 6 and 9. It needs no network.

    ## Action Space

    `MultiDiscrete([2] * P)`: one number per token, row by row from the top left of the image.

    | Value | Meaning |
    |---|---|
    | 0 | prune |
    | 1 | keep |

    The action of a token that was pruned before is ignored; keeping it is illegal, which is
    counted in `info["illegal_actions"]`. `action_masks()` returns the legal actions in the form
    that sb3-contrib's MaskablePPO reads.

    If the model's head reads patch tokens, an action that would prune all that are left prunes
    none.

    ## Observation Space

    `Box(-inf, inf, (P, F + G), float32)`: one row per token, zeros for a pruned one and for all at
    the end of an episode. `D` is the model's width, `K` the number of decisions. `features`
    chooses the features and their order, and `share=False` leaves the last line out. All numbers
    are dimensionless.

    | Num | Observation | Min | Max |
    |---|---|---|---|
    | D | `token`: the token's embedding after the LayerNorm of the coming block | -inf | inf |
    | 8 | `position`: sine and cosine of row and column | -1 | 1 |
    | K | `progress`: which decision it is, one-hot | 0 | 1 |
    | 1 | `progress`: share of tokens left | 0 | 1 |
    | 1 | `cls_attention`: log of the class token's attention over its mean | -4 | log P |
    | 1 | `redundancy`: cosine with a more attended token's key (not by default) | -1 | 1 |
    | 2 | `similarity`: cosine with class and mean token (not by default) | -1 | 1 |
    | 1 | `norm`: log norm of the embedding over its mean (not by default) | -4 | log P |
    | P | `agent_id`: one-hot number of the token (not by default) | 0 | 1 |
    | D | the class token after that LayerNorm (without one: mean of tokens left) | -inf | inf |

    ## Rewards

    The sum over the tokens of the multi-agent game's rewards. `P'` is the number of tokens left
    after a decision; `correct` is 1 if the reduced model predicts the true class, else 0.

    | `reward` | after each decision | at the end, in addition |
    |---|---|---|
    | `"alpha_beta"` | `-beta * P'` | `alpha * correct` for each decision that left a token * |
    | `"keep_target"` | `-exp(d) * P'` if `d > 0`, else `-exp(-d)` per token pruned | the same |
    | `"cooperative"` | `-beta * P'` | `P * alpha * exp(-KL(dense, reduced prediction))` |

    `*` with `reward_kwargs={"class_reward": "final"}` only once, if the last decision left a token.

    `d` is the share of tokens left minus the decision's target; the targets are 0.7, 0.49, 0.343,
    ... The defaults are `alpha = 24 * P / 196` (cooperative: 1) and `beta = 0.1` (cooperative:
    0.002). RL4EViT's code has `alpha = 24` for 196 tokens; in proportion to `P` the equilibrium is
    at the same share of tokens for a model of any size.

    ## Starting State

    The next image of the data set, with all its tokens. Images come in a random order, another one
    in every epoch; `reset(seed=...)` restarts it.

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
    | `active_mask` | which tokens are left | bool `(P,)` |
    | `tokens_left` | number of visual tokens left | int in 0 to P |
    | `illegal_actions` | illegal actions in this episode | int from 0 |
    | `correct` | whether the reduced model predicts the true class; False before the end | bool |
    | `dense_correct` | whether the dense model predicts it; False before the end | bool |

    ## Arguments

    ```python
    >>> import gymnasium as gym
    >>> import tokenenv
    >>> env = gym.make("tokenenv/TokenPrune-v0", reward="cooperative", max_cycles=2)
    >>> observation, info = env.reset(seed=0)
    >>> observation.shape[0], info["tokens_left"]
    (64, 64)
    >>> _, reward, terminated, truncated, info = env.step(env.action_space.sample() * 0 + 1)
    >>> terminated, info["tokens_left"]
    (False, 64)

    ```

    | Parameter | Type | Default | Description |
    |---|---|---|---|
    | `model` | **str** or Backbone | `"digits_vit"` | timm model name, or a ready backbone |
    | `weights` | **str** | `None` | file of weights for a model given by name |
    | `data` | **str** or ImageSource | `None` | folder or data set name; None: the digits |
    | `split` | **str** | `"train"` | part of the data: `"train"` or `"test"` |
    | `blocks` | **tuple** | `None` | decision blocks; None: `max_cycles`, spread evenly |
    | `max_cycles` | **int** | `None` | number of decisions; None: that of `blocks`, or 3 |
    | `features` | **tuple** | token, position, progress, cls_attention | see above |
    | `share` | **bool** | `True` | whether each row also holds the class token |
    | `reward` | **str** or Reward | `"alpha_beta"` | see Rewards, or a function of a Turn |
    | `reward_kwargs` | **dict** | `None` | parameters of a reward given by name |
    | `device` | **str** | `"cpu"` | where to put a model given by name |
    | `dtype` | **str** | `"float32"` | its precision: also `"bfloat16"`, `"float16"` |
    | `execution` | **str** | `None` | `"masked"`, `"padded"`, `"packed"`; None: by device |
    | `render_mode` | **str** | `None` | `"human"` (a window), `"rgb_array"`, `"ansi"` |

    ## Vectorized environment

    One batched game, no processes:

    ```python
    >>> envs = gym.make_vec("tokenenv/TokenPrune-v0", num_envs=4)
    >>> envs
    TokenPruneVectorEnv(tokenenv/TokenPrune-v0, num_envs=4)

    ```

    See {class}`tokenenv.envs.token_prune_vector.TokenPruneVectorEnv`. An `AsyncVectorEnv` of
    single environments works too. Its workers are forked, and use one thread each, if
    `tokenenv` was imported before; on a GPU they need `context="spawn"`.

    ## Version History

    * v0: initial version
    """

    rules: ClassVar[str] = "token_prune"
