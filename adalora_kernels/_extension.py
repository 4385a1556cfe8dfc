"""Loads the library of csrc/: the importance update, and the launcher of a layer's kernels.

Without it `importance` does the same in PyTorch, and Triton launches; nothing here raises.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

# Names a library to load instead of the installed one; empty: none.
VARIABLE = "ADALORA_KERNELS_LIBRARY"


class Library(NamedTuple):
    """The library that was loaded, if any.

    Attributes:
        path: where it is; None if there is none.
        built_for: "CPU", or "CPU and CUDA (8.0 9.0 …)"; empty if there is none.
        why_not: why there is none; empty if there is one.
    """

    path: Path | None
    built_for: str
    why_not: str

    @property
    def device_types(self) -> tuple[str, ...]:
        """The types of device that it has code for."""
        return tuple(name for name in ("cpu", "cuda") if name.upper() in self.built_for)

    def why_not_on(self, device: torch.device) -> str | None:
        """Say why its code for a whole model does not run on a device; None if it does.

        A GPU is asked, and tensors of this process are to be on it: that makes a CUDA context.
        """
        if self.path is None or device.type not in self.device_types:
            return self.why_not or f"the library was built for {self.built_for} only"
        if device.type == "cpu":
            return None
        function = ctypes.CDLL(str(self.path)).adalora_why_not_on_gpu
        function.restype = ctypes.c_char_p
        why = function(device.index or 0).decode()
        return f"the library, built for {self.built_for}, cannot run on it: {why}" if why else None

    def forget_plans(self) -> None:
        """Have it ask again what each call of a layer launches."""
        if self.path is not None:
            ctypes.CDLL(str(self.path)).adalora_forget_plans()


def load() -> Library:
    """Load it; the dispatcher then prefers its code to ours."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        if not named:
            return Library(None, "", f"{VARIABLE} is empty")
        path = Path(named)
    else:
        found = sorted(Path(__file__).parent.glob("_C*.so"))
        if not found:
            return Library(None, "", "this installation has no compiled library")
        path = found[0]
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
        exported = ctypes.CDLL(str(path))
        function = exported.adalora_built_for
        # One that was built from older sources has no launcher.
        exported.adalora_forget_plans  # noqa: B018
    except (OSError, AttributeError, RuntimeError) as error:
        # torch names the file only; the linker's complaint is the cause.
        why_not = f"{path} cannot be loaded: {error.__cause__ or error}"
        warnings.warn(why_not, RuntimeWarning, stacklevel=2)
        return Library(None, "", why_not)
    function.restype = ctypes.c_char_p
    return Library(path, function().decode(), "")
