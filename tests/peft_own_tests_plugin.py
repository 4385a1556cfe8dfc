"""A pytest plugin for running PEFT's own test files offline: of their tests those about AdaLoRA.

`test_peft_own_tests.py` runs it in a process of its own. PEFT's files stay as they are.
"""

import importlib.machinery
import json
import sys
import types
from collections import Counter
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from peft import AdaLoraConfig, PeftConfig
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import nn

# Imported by the test files for other methods than AdaLoRA; hundreds of megabytes to install, and
# seconds to import.
UNUSED = ("datasets", "diffusers", "scipy")

# Tests about AdaLoRA that fail here with plain PEFT too, and why.
LEFT_OUT = {
    "test_decoder_model": "which tokens are generated depends on the weights that are on the hub",
    "test_from_peft_type": "AdaMSS, which is in it too, needs scikit-learn",
    "test_adalora_loftq_config_raises": "LoftQ needs scipy",
}

# What PEFT's tests demand and we do otherwise on purpose.
DIFFERENT = {"test_forward_with_labels": "the loss in evaluation is without the regulariser"}

_small = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 64,
}
_gpt = {"vocab_size": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_seq2seq = {"vocab_size": 128, "d_model": 32}
_bart = {
    f"{part}_{name}": value
    for part in ("encoder", "decoder")
    for name, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 37))
}
_t5 = {"d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}

# The tiny random models that the tests take from the Hugging Face hub: class and config of ours.
MODELS = {
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        _small | {"head_dim": 8, "num_key_value_heads": 2},
    ),
    "peft-internal-testing/tiny-dummy-qwen2": (
        "Qwen2ForCausalLM",
        _small | {"num_key_value_heads": 2},
    ),
    "peft-internal-testing/tiny-random-OPTForCausalLM": (
        "OPTForCausalLM",
        _small | {"ffn_dim": 37, "word_embed_proj_dim": 32},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", _gpt),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "GPTJForCausalLM",
        _gpt | {"rotary_dim": 4},
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        _seq2seq | _bart | {"max_position_embeddings": 64},
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        _seq2seq | _t5,
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        _small | {"num_labels": 1},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _small),
} | {
    f"peft-internal-testing/tiny-random-{name}": (name, _small)
    for name in (
        "BertForSequenceClassification",
        "BertModel",
        "DebertaModel",
        "DebertaV2Model",
        "RobertaForSequenceClassification",
        "RobertaModel",
    )
}

# By test file.
passed: Counter[str] = Counter()
failed_on_purpose: Counter[str] = Counter()
# Forwards by the class of the layer, the tuner and its allocator.
forwards: Counter[str] = Counter()


class Unused(types.ModuleType):
    """In the place of a package; what is imported from it is an empty class."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def pytest_addoption(parser):
    parser.addoption("--ours", action="store_true", help="with adalora_kernels.peft.enable()")
    parser.addoption("--report", type=Path, help="the JSON file for the counts")


def pytest_configure(config):
    hub = Path(huggingface_hub.constants.HF_HUB_CACHE)
    if config.rootpath not in hub.parents:
        raise pytest.UsageError(f"HF_HUB_CACHE must be in {config.rootpath}: models are made there")
    make_models(hub)
    nn.modules.module.register_module_forward_hook(count_forward)
    if config.getoption("--ours"):
        import adalora_kernels.peft

        adalora_kernels.peft.enable()


def make_models(hub):
    """What a download of MODELS leaves in the cache."""
    for model_id, (class_name, options) in MODELS.items():
        torch.manual_seed(0)
        cls = getattr(transformers, class_name)
        folder = hub / f"models--{model_id.replace('/', '--')}"
        cls(cls.config_class(**options)).save_pretrained(folder / "snapshots" / "made_here")
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("made_here")


def count_forward(module, *_):
    used = []
    if isinstance(module, AdaLoraModel):
        used = [module, getattr(module, "rankallocator", None)]
    elif isinstance(module, AdaLoraLayer) and not (module.disable_adapters or module.merged):
        used = [module]
    forwards.update(f"{type(x).__module__}.{type(x).__name__}" for x in used if x is not None)


@pytest.hookimpl(wrapper=True)
def pytest_collection(session):
    imported = {name: sys.modules.pop(name, None) for name in UNUSED}
    sys.modules.update({name: Unused(name) for name in UNUSED})
    try:
        return (yield)
    finally:
        for name, module in imported.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def pytest_collection_modifyitems(config, items):
    chosen, others = [], []
    for item in items:
        (chosen if is_about_adalora(item) else others).append(item)
    items[:] = chosen
    config.hook.pytest_deselected(items=others)
    if config.getoption("--ours"):
        for item in items:
            reason = DIFFERENT.get(item.originalname)
            if reason is not None:
                expected = pytest.mark.xfail(reason=reason, raises=AssertionError, strict=True)
                item.add_marker(expected)


def is_about_adalora(item):
    """By the config that it is parametrised with; without one, by its name or its code."""
    if item.originalname in LEFT_OUT:
        return False
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    classes = [p if isinstance(p, type) else type(p) for p in parameters]
    configs = [cls for cls in classes if issubclass(cls, PeftConfig)]
    if configs:
        return AdaLoraConfig in configs
    return "adalora" in item.name.lower() or "AdaLoraConfig" in item.function.__code__.co_names


def pytest_collection_finish(session):
    # PEFT goes online for models that are not in this table, in spite of HF_HUB_OFFLINE.
    utils = sys.modules["tests.testing_utils"]
    utils._HUB_MODEL_ACCESSES.update(dict.fromkeys(MODELS, 1))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and call.excinfo is not None and misses_the_hub(call.excinfo.value):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, "needs files of the Hugging Face hub")
    return report


def misses_the_hub(error):
    while error is not None:
        if isinstance(error, huggingface_hub.errors.LocalEntryNotFoundError):
            return True
        error = error.__cause__ or error.__context__
    return False


def pytest_runtest_logreport(report):
    name = Path(report.location[0]).name
    if report.when == "call" and report.passed:
        passed[name] += 1
    elif report.skipped and hasattr(report, "wasxfail"):
        failed_on_purpose[name] += 1


def pytest_sessionfinish(session):
    path = session.config.getoption("--report")
    if path is not None:
        counts = {"passed": passed, "failed_on_purpose": failed_on_purpose, "forwards": forwards}
        path.write_text(json.dumps(counts))
