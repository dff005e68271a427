"""The decorator of every step's component."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

from spectraqlora.runtime.images import image_reference

_OPTIONAL_INPUT = re.compile(r"Optional\[(dsl\.Input\[[\w.]+\])\]")


def component(image: str) -> Callable[[Callable[..., Any]], Any]:
    """Make a function the KFP component of a step that runs in `image`.

    Where KFP's compiler is not at hand (KFP's own runtime in a pod, `python -m spectraqlora`), the plain function
    is what is called, and what comes back.

    The compiled command holds the function's source without `Optional` around artifacts: KFP's executor does not
    strip it from inputs for which the backend names no schema, and fails (seen with KFP 2.17). The component's
    interface stays optional, and an input that is not given is None.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        function.__dict__["image"] = image
        if os.environ.get("_KFP_RUNTIME") == "true":
            return function
        from kfp import dsl

        made = dsl.component(base_image=image_reference(image), install_kfp_package=False)(function)
        container = made.component_spec.implementation.container
        container.command = [_OPTIONAL_INPUT.sub(r"\1", part) for part in container.command]
        return made

    return decorate


def plain(component: Any) -> Callable[..., Any]:
    """The function under the decorator."""
    function: Callable[..., Any] = getattr(component, "python_func", component)
    return function
