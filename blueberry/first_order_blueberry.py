"""Backwards written out by hand have gradients of first order; asked for more, they must not be silently wrong.

The file ships to the Hub as remote code, so it imports torch only.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward of an autograd function that cannot be differentiated again: an error under `create_graph=True`.

    torch's `once_differentiable` lets `torch.autograd.grad` leave the error out together with the terms of the
    derivative that run through it: Hessians lacked them and nothing told.
    """

    @wraps(backward)
    def of_first_order(*arguments: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: Blueberry's operations have no second derivatives; take differences of gradients"
            )
        return backward(*arguments)

    return of_first_order
