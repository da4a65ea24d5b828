"""The weights of the embedded models, which come with the package."""

from __future__ import annotations

from torch import Tensor, nn

from tokenenv.errors import UserError


def load_packaged(model: nn.Module, state: dict[str, Tensor], name: str, shape: str) -> None:
    """Load packaged weights.

    Args:
        model: the model to load them into.
        state: the weights by parameter.
        name: whose weights they are.
        shape: the arguments that they fit, in words.

    Raises:
        UserError: the model has another shape.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"{name}'s weights fit only its own shape ({shape}); leave such arguments out or use "
            "pretrained=False"
        ) from error
