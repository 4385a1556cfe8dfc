"""Saves and loads adapters in PEFT's format, and exports them as plain LoRA.

Written and read are safetensors and JSON: nothing is ever unpickled.
"""

from .load import load_adapter
from .save import export_lora, save_adapter
from .state import STATE_NAME, load_state, save_state

__all__ = [
    "STATE_NAME",
    "export_lora",
    "load_adapter",
    "load_state",
    "save_adapter",
    "save_state",
]
