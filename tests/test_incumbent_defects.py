"""What PEFT (in the last test loralib) gets wrong, and that the same scenario goes right with ours.

One number per defect. `..._peft` shows the defect in the PEFT that is installed; `..._ours` runs
the same scenario with our package.
"""

import contextlib
import copy
import json
import re
import warnings

import peft
import pytest
import torch
import torch.distributed as dist
from hands import enabled
from helpers import CountOps
from loralib_twin import TwinLinear
from peft import (
    AdaLoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from ranks import on_ranks
from test_peft import Net, batch, make, optimizer_of, tiny_bert, train
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import adalora_kernels.loralib as loralib
from adalora_kernels.export import export_lora, save_adapter
from adalora_kernels.peft import allocator_of, apply
from adalora_kernels.trainer import AdaLoraCallback

# In this version every defect was seen, so its absence here means that a test has gone wrong.
SEEN_IN = "0.21.2"
ALL, TARGET = 18, 9  # triplets of `make()`: three matrices, init_r 6, target_r 3


def defect(seen):
    if not seen and peft.__version__ != SEEN_IN:
        pytest.skip(f"fixed in peft {peft.__version__}")
    assert seen


@contextlib.contextmanager
def fails(error, message):
    """The defect is that the block raises `error`."""
    caught = None
    try:
        yield
    except error as e:
        caught = e
    defect(caught is not None)
    assert re.search(message, str(caught)), caught


def as_it_is(model):
    """Instead of `apply`: the incumbent."""


def singular_values(model):
    return {n: p.detach() for n, p in model.named_parameters() if "lora_E" in n}


def alive(model):
    """Triplets that take part in the forward now."""
    return sum(int(values.count_nonzero()) for values in singular_values(model).values())


def kept(model, adapter="default"):
    """Triplets that saving keeps."""
    pattern = model.peft_config[adapter].rank_pattern
    return sum(map(sum, pattern.values())) if pattern else None


def penalty(model, weight):
    """PEFT's regulariser, written out once more."""
    factors = [(n, p) for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]
    grams = [p @ p.T if "lora_A" in n else p.T @ p for n, p in factors]
    return weight * sum((g - torch.eye(len(g))).norm() for g in grams) / len(grams)


def penalty_gradients(model, weight):
    twin = copy.deepcopy(model)
    penalty(twin, weight).backward()
    return {n: p.grad for n, p in twin.named_parameters() if "lora_A" in n or "lora_B" in n}


def assert_gradients(model, expected):
    parameters = dict(model.named_parameters())
    for name, gradient in expected.items():
        torch.testing.assert_close(parameters[name].grad, gradient, msg=name)


def rows(count=64):
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "x": torch.randn(16, generator=generator),
            "labels": torch.randint(0, 8, (), generator=generator),
        }
        for _ in range(count)
    ]


def trainer(model, path, *callbacks, data=None, **options):
    arguments = {
        "output_dir": path,
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    return Trainer(
        model,
        TrainingArguments(**arguments),
        train_dataset=rows() if data is None else data,
        callbacks=list(callbacks),
    )


class CallPeft(TrainerCallback):
    """What forums tell users of PEFT to write; `offset` is what they forget."""

    def __init__(self, offset=0):
        self.offset = offset

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        model.base_model.update_and_allocate(state.global_step + self.offset)


@pytest.mark.full
def test_01_trainer_does_not_allocate_peft(tmp_path):
    """Trainer never calls update_and_allocate: all triplets stay, and nobody says so."""
    model = make(total_step=10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(model, tmp_path).train()
    silent = not any("allocat" in str(warning.message) for warning in caught)
    defect(alive(model) == ALL and kept(model) is None and silent)


@pytest.mark.parametrize(
    "total_step",
    [pytest.param(10, marks=pytest.mark.full), None],
    ids=["given", "from_the_trainer"],
)
def test_01_trainer_allocates_ours(tmp_path, total_step):
    """The callback attaches the allocator to Trainer's optimizer, and knows max_steps."""
    with enabled():
        model = make(total_step=10)
    model.peft_config["default"].total_step = total_step
    trainer(model, tmp_path, AdaLoraCallback()).train()
    assert alive(model) == kept(model) == TARGET


def test_01_forgotten_callback_warns_ours(tmp_path):
    """Without the callback our layers notice that the optimizer steps and the allocator doesn't."""
    model = make(total_step=10)
    apply(model)
    with pytest.warns(UserWarning, match="plain LoRA"):
        trainer(model, tmp_path).train()


def injected(way):
    """(model, its inputs, triplets at the end) of an adapter without a PeftModel around it."""
    options = {"init_r": 4, "target_r": 2, "total_step": 10, "tinit": 1, "tfinal": 2}
    if way == "inject_adapter_in_model":
        config = AdaLoraConfig(target_modules=["fc0", "fc1", "fc2"], **options)
        x, labels = batch(1)
        return inject_adapter_in_model(config, Net()).train(), {"x": x, "labels": labels}, 6
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 50}
    bert = BertForSequenceClassification(
        BertConfig(num_hidden_layers=2, num_attention_heads=2, **sizes)
    )
    bert.add_adapter(AdaLoraConfig(target_modules=["query", "value"], **options))
    ids = torch.randint(0, 50, (8, 10))
    return bert.train(), {"input_ids": ids, "labels": ids.sum(1) % 2}, 8


WAYS = ["inject_adapter_in_model", "add_adapter"]


@pytest.mark.parametrize("way", WAYS)
def test_02_injected_adapter_peft(way):
    """PEFT throws its AdaLoraModel away, and update_and_allocate with it: nothing can allocate."""
    model, _, _ = injected(way)
    defect(not any(hasattr(module, "update_and_allocate") for module in model.modules()))


@pytest.mark.parametrize("takes_over", ["apply", "enable"])
@pytest.mark.parametrize("way", WAYS)
def test_02_injected_adapter_ours(way, takes_over):
    """We find the layers in any module, and give the model its update_and_allocate back."""
    if takes_over == "enable":
        with enabled():
            model, inputs, target = injected(way)
    else:
        model, inputs, target = injected(way)
        apply(model)
    allocator = allocator_of(model)
    optimizer = optimizer_of(model, "adamw")
    for step in range(1, 11):
        model(**inputs).loss.backward()
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()
    assert alive(model) == sum(allocator.ranks().values()) == target


def losses(scenario, prepare=as_it_is):
    """(model, the loss that training uses, the loss of the task) after `prepare(model)`."""
    model = make() if scenario == "no_task_type" else tiny_bert()
    prepare(model)
    if scenario == "no_task_type":
        x, labels = batch(1)
        output = model(x, labels=labels)
        return model, output.loss, nn.functional.cross_entropy(output.logits, labels)
    ids = torch.randint(0, 50, (8, 10))
    labels = ids.sum(dim=1) % 2
    if scenario == "eval":
        model.eval()
    with model.disable_adapter() if scenario == "disabled" else contextlib.nullcontext():
        output = model(input_ids=ids, labels=labels, return_dict=scenario != "tuple")
    logits = output[1]
    task = nn.functional.cross_entropy(logits, labels)
    return model, task if scenario == "outside" else output[0], task


MISSING = ["no_task_type", "tuple", "outside"]
UNWANTED = ["eval", "disabled"]


@pytest.mark.parametrize("scenario", MISSING)
def test_03_regulariser_missing_peft(scenario):
    """PEFT adds the regulariser to `output.loss` in one forward; other losses are without it."""
    model, loss, task = losses(scenario)
    assert model.peft_config["default"].orth_reg_weight > 0
    defect(loss == task)


@pytest.mark.parametrize("scenario", MISSING)
def test_03_regulariser_missing_ours(scenario):
    """Attached to the optimizer, its gradient is added there, whatever the model returns."""
    model, loss, task = losses(scenario, apply)
    expected = penalty_gradients(model, model.peft_config["default"].orth_reg_weight)
    optimizer = optimizer_of(model, "adamw")
    allocator_of(model).attach(optimizer)
    loss.backward()
    optimizer.step()
    # lora_E starts at 0, so the task has no gradient for lora_A and lora_B.
    assert loss == task
    assert_gradients(model, expected)


@pytest.mark.parametrize("scenario", UNWANTED)
def test_03_regulariser_in_evaluation_peft(scenario):
    """PEFT adds it in evaluation and to the base model, whose losses look worse than they are."""
    _, loss, task = losses(scenario)
    defect(loss > task + 0.1)


@pytest.mark.parametrize("scenario", UNWANTED)
def test_03_regulariser_in_evaluation_ours(scenario):
    """Ours is for training only."""
    _, loss, task = losses(scenario, apply)
    torch.testing.assert_close(loss, task)


def ops_of_the_regulariser(model):
    model.peft_config["default"].orth_reg_weight = 0.0
    x, labels = batch(1)
    counts = []
    for forward in (model.base_model, model.base_model.model):
        with CountOps() as ops:
            forward(x, labels=labels)
        counts.append(sum(ops.counts.values()))
    return counts[0] - counts[1]


def test_03_regulariser_at_weight_0_peft():
    """PEFT computes it at weight 0, to add 0."""
    defect(ops_of_the_regulariser(make()) > 10)


def test_03_regulariser_at_weight_0_ours():
    """At weight 0 there is nothing to compute."""
    model = make()
    apply(model)
    assert ops_of_the_regulariser(model) == 0


def tiny_llama(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 32}
    llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, num_attention_heads=2, **sizes))
    arguments = {
        "task_type": "CAUSAL_LM",
        "init_r": 4,
        "target_r": 2,
        "total_step": 10,
        "target_modules": ["q_proj", "v_proj"],
        "orth_reg_weight": 0.1,
        **options,
    }
    return get_peft_model(llama, AdaLoraConfig(**arguments)).train()


class KeepGradients(TrainerCallback):
    """Trainer clears them after this."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if "lora_A" in n}


def one_accumulated_step(tmp_path, *callbacks):
    """How often the regulariser is in the gradients of each lora_A, after four micro-batches."""
    model, keep = tiny_llama(total_step=1, tinit=0), KeepGradients()
    once = penalty_gradients(model, 0.1)
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 32, (8, 8))]
    options = {"max_steps": 1, "max_grad_norm": 0.0, "gradient_accumulation_steps": 4}
    options["per_device_train_batch_size"] = 2
    trainer(model, tmp_path, *callbacks, keep, data=data, **options).train()
    return torch.stack([(g / once[n]).median() for n, g in keep.gradients.items()])


@pytest.mark.full
def test_03_regulariser_under_accumulation_peft(tmp_path):
    """Trainer divides a causal LM's loss by the tokens of all micro-batches before the forward;
    what PEFT adds in each forward is not divided, and counts four times."""
    times = one_accumulated_step(tmp_path)
    defect(times.allclose(torch.tensor(4.0)))


def test_03_regulariser_under_accumulation_ours(tmp_path):
    """The optimizer steps once, and so does our regulariser."""
    times = one_accumulated_step(tmp_path, AdaLoraCallback())
    torch.testing.assert_close(times, torch.ones_like(times))


def train_with_an_overflow(model, by_hand=True):
    """Twenty steps under a GradScaler; in the fifth the gradients overflow, as fp16's do."""
    optimizer = optimizer_of(model, "adamw")
    if not by_hand:
        allocator_of(model).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", growth_interval=1000)
    for step in range(1, 21):
        x, labels = batch(step)
        loss = model.base_model(x, labels=labels).loss
        scaler.scale(loss * 2.0**127 if step == 5 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if by_hand:
            model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    assert scaler.get_scale() == 2.0**15, "one step overflowed"
    assert all(p.isfinite().all() for p in model.parameters())


def test_04_overflow_peft():
    """One step with inf in the gradients makes every average NaN for good; NaN is never below the
    threshold, so nothing is pruned any more."""
    model = make(init_r=8, target_r=4, total_step=20, tinit=2, tfinal=4)
    train_with_an_overflow(model)
    defect(alive(model) == kept(model) == 24)


@pytest.mark.parametrize("by_hand", [True, False], ids=["by_hand", "attached"])
def test_04_overflow_ours(by_hand):
    """Such a step changes no average: called by hand it is counted, attached it is not even seen,
    because the scaler does not call the optimizer."""
    model = make(init_r=8, target_r=4, total_step=20, tinit=2, tfinal=4)
    allocator = apply(model).allocator
    train_with_an_overflow(model, by_hand)
    assert alive(model) == kept(model) == 12
    assert allocator.summary()["skipped_steps"] == (1 if by_hand else 0)


def ranknums(model):
    return {n: p for n, p in model.named_parameters() if "ranknum" in n}


def train_on_a_bfloat16_base(prepare=as_it_is):
    torch.manual_seed(0)
    config = AdaLoraConfig(
        init_r=4,
        target_r=2,
        lora_alpha=16,
        total_step=100,
        tfinal=10,
        target_modules=["fc0", "fc1", "fc2"],
    )
    model = get_peft_model(Net().bfloat16(), config).train()
    prepare(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    train(model, optimizer, range(1, 101), torch.bfloat16)
    return model


def error_after_reloading(model, path):
    """Relative, of all updates of the weights, in plain PEFT.

    Onto a float32 base: onto a bfloat16 one PEFT rounds what it loads.
    """
    model.save_pretrained(path)
    loaded = PeftModel.from_pretrained(Net(), path)
    trained, reloaded = (
        torch.cat(
            [
                module.get_delta_weight("default").detach().flatten()
                for module in m.modules()
                if hasattr(module, "get_delta_weight")
            ]
        )
        for m in (model, loaded)
    )
    return ((trained - reloaded).norm() / trained.norm()).item()


@pytest.mark.full
def test_05_ranknum_drifts_peft(tmp_path):
    """Casting the adapter makes ranknum, of which the scaling is made, a trainable parameter. It
    drifts, and is not saved: what is loaded is not what was trained."""
    model = train_on_a_bfloat16_base()
    drift = max(abs(p.item() - 4.0) for p in ranknums(model).values())
    defect(drift > 0.02)
    defect(error_after_reloading(model, tmp_path) > 0.005)


@pytest.mark.parametrize("way", ["apply", "enable"])
def test_05_ranknum_drifts_ours(tmp_path, way):
    """It is made a constant again before the optimizer can see it."""
    if way == "apply":
        model = train_on_a_bfloat16_base(apply)
    else:
        with enabled():
            model = train_on_a_bfloat16_base()
    assert len(ranknums(model)) == 3
    assert all(p == 4.0 and not p.requires_grad for p in ranknums(model).values())
    assert error_after_reloading(model, tmp_path) < 1e-6


def assert_same_adapter(model, expected):
    """Bit for bit, after saving's pruning."""
    assert model.peft_config["default"].rank_pattern == expected.peft_config["default"].rank_pattern
    state = get_peft_model_state_dict(model)
    for name, value in get_peft_model_state_dict(expected).items():
        assert torch.equal(state[name], value), name


def interrupted_run(path, callback):
    """Ten steps, with a checkpoint after the sixth, when some triplets are pruned."""
    model = make(total_step=10, tinit=1, tfinal=2)
    trainer(model, path, callback, save_strategy="steps", save_steps=6).train()
    return model


def resume(path, way, callback):
    """From step 6, the model made anew or loaded by PEFT."""
    checkpoint = path / "checkpoint-6"
    if way == "new":
        model = make(total_step=10, tinit=1, tfinal=2)
    else:
        torch.manual_seed(0)
        model = PeftModel.from_pretrained(Net(), checkpoint, is_trainable=True)
    trainer(model, path, callback).train(resume_from_checkpoint=str(checkpoint))
    return model


@pytest.mark.full
@pytest.mark.parametrize(
    ("way", "error", "message"),
    [("new", RuntimeError, "size mismatch"), ("loaded", IndexError, "shape of the mask")],
    ids=["new", "loaded"],
)
def test_06_resume_peft(tmp_path, way, error, message):
    """A checkpoint has the adapter already pruned, an optimizer with the initial ranks, and
    nothing of the allocator: it can't be resumed into either model."""
    interrupted_run(tmp_path, CallPeft(1))
    with fails(error, message):
        resume(tmp_path, way, CallPeft(1))


@pytest.mark.parametrize("way", ["new", "loaded"])
def test_06_resume_ours(tmp_path, way):
    """Our checkpoints have all triplets and the allocator's state: the run goes on bit for bit."""
    expected = interrupted_run(tmp_path, AdaLoraCallback())
    model = resume(tmp_path, way, AdaLoraCallback())
    assert kept(model) == kept(expected) == TARGET
    assert_same_adapter(model, expected)


def save_a_pruned_adapter(path, save=save_adapter):
    """By default in PEFT's own form, with a rank_pattern."""
    model = make(tinit=3, tfinal=5)
    apply(model)
    train(model, optimizer_of(model, "adamw"), range(1, 31))
    save(model, path)


def load_to_go_on(path, takes_over=None, **options):
    torch.manual_seed(0)
    with enabled() if takes_over == "enable" else contextlib.nullcontext():
        model = PeftModel.from_pretrained(Net(), path, is_trainable=True).train()
    assert alive(model) == TARGET
    for name, value in options.items():
        setattr(model.peft_config["default"], name, value)
    if takes_over == "apply":
        apply(model)
    return model


def test_07_continuing_from_a_pruned_adapter_peft(tmp_path):
    """PEFT counts the budget from init_r, although only the kept triplets have been loaded: it
    prunes the difference once more, of 9 triplets nearly all."""
    save_a_pruned_adapter(tmp_path)
    model = load_to_go_on(tmp_path)
    train(model, optimizer_of(model, "adamw"), range(1, 31))
    defect(alive(model) <= 1)


@pytest.mark.parametrize(
    ("target_r", "expected", "takes_over"),
    [
        (3, 9, "apply"),
        (2, 6, "enable"),
        pytest.param(3, 9, "enable", marks=pytest.mark.full),
        pytest.param(2, 6, "apply", marks=pytest.mark.full),
    ],
)
@pytest.mark.parametrize("save", [save_adapter, PeftModel.save_pretrained])
def test_07_continuing_from_a_pruned_adapter_ours(tmp_path, target_r, expected, takes_over, save):
    """Our budget starts from the triplets that are there; what is saved then loads in PEFT."""
    save_a_pruned_adapter(tmp_path / "first", save)
    model = load_to_go_on(tmp_path / "first", takes_over, target_r=target_r)
    train(model, optimizer_of(model, "adamw"), range(1, 31))
    assert alive(model) == expected
    model.save_pretrained(tmp_path / "second")
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), tmp_path / "second").eval()
    assert alive(loaded) == expected
    x, _ = batch(1)
    torch.testing.assert_close(loaded(x).logits, model.eval()(x).logits)


@pytest.mark.full
def test_07_resuming_what_was_continued_ours(tmp_path):
    """A checkpoint of such a run holds the triplets that it started with, and can be resumed."""
    save_a_pruned_adapter(tmp_path / "first")
    options = {"target_r": 2, "total_step": 10, "tfinal": 2}
    expected, model = (load_to_go_on(tmp_path / "first", "apply", **options) for _ in range(2))
    saving = {"save_strategy": "steps", "save_steps": 6}
    trainer(expected, tmp_path, AdaLoraCallback(), **saving).train()
    resumed = trainer(model, tmp_path, AdaLoraCallback())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert alive(model) == 6
    assert_same_adapter(model, expected)


def train_with_equal_scores(why, model):
    """Scores that underflow in float16; or all 0, because nothing has been learnt yet."""
    if why == "underflow":
        train(model, optimizer_of(model, "sgd"), range(1, 31), torch.float16)
        return
    x, _ = batch(1)
    for value in singular_values(model).values():
        nn.init.normal_(value)
    for step in (1, 2):
        (0.0 * model(x).logits).sum().backward()
        model.base_model.update_and_allocate(step)


TIES = {"underflow": {"dtype": torch.float16}, "no_gradient": {"total_step": 2}}


@pytest.mark.parametrize("why", TIES)
def test_08_equal_scores_peft(why):
    """PEFT prunes `score <= threshold`: where all scores are equal, that is everything."""
    model = make(**TIES[why])
    train_with_equal_scores(why, model)
    defect(alive(model) == kept(model) == 0)


@pytest.mark.parametrize("why", TIES)
def test_08_equal_scores_ours(why):
    """Exactly the budget is kept, of equal triplets the first; and averages are float32."""
    model = make(**TIES[why])
    apply(model)
    train_with_equal_scores(why, model)
    assert alive(model) == kept(model) == TARGET


def step_with_target(target_r, prepare=as_it_is):
    model = make(target_r=target_r)
    prepare(model)
    train(model, optimizer_of(model, "adamw"), [1])
    return model


@pytest.mark.parametrize("target_r", [6, 7], ids=["all", "more"])
def test_08_nothing_to_prune_peft(target_r):
    """A target that prunes nothing asks kthvalue for its 0th value."""
    with fails(RuntimeError, "kthvalue"):
        step_with_target(target_r)


@pytest.mark.parametrize("target_r", [6, 7], ids=["all", "more"])
def test_08_nothing_to_prune_ours(target_r):
    """Then nothing is pruned."""
    assert alive(step_with_target(target_r, apply)) == ALL


def error_of_the_saved_adapter(model, path):
    """Between the trained logits and those of what `save_pretrained` has written."""
    model.save_pretrained(path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), path).eval()
    x, _ = batch(1)
    return (loaded(x).logits - model.eval()(x).logits).abs().max().item()


FAST = {"learning_rate": 5e-2, "lr_scheduler_type": "constant"}


@pytest.mark.full
def test_09_last_mask_peft(tmp_path):
    """Trainer counts from 0 where PEFT has to be called, so step total_step never comes, which
    would have pruned for the last time: here no triplet is pruned in the end, and what saving
    drops was part of what was trained."""
    model = make(total_step=10, deltaT=4)
    trainer(model, tmp_path, CallPeft(), **FAST).train()
    defect(alive(model) == ALL)
    defect(error_of_the_saved_adapter(model, tmp_path) > 1e-3)


def test_09_last_mask_ours(tmp_path):
    """Our callback's first step is 1 and the last max_steps: the last budgeting step prunes."""
    model = make(total_step=10, deltaT=4)
    trainer(model, tmp_path, AdaLoraCallback(), **FAST).train()
    assert alive(model) == kept(model) == TARGET
    assert allocator_of(model).global_step == 10
    assert error_of_the_saved_adapter(model, tmp_path) < 1e-6


def adapter_called_fc():
    torch.manual_seed(0)
    config = AdaLoraConfig(
        init_r=6, target_r=3, total_step=10, target_modules=["fc0", "fc1", "fc2"]
    )
    return get_peft_model(Net(), config, adapter_name="fc").train()


def train_ten_steps(model):
    optimizer = optimizer_of(model, "adamw")
    for step in range(1, 11):
        x, labels = batch(step)
        model(x, labels=labels).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()


def test_10_adapter_name_in_a_module_path_peft(tmp_path):
    """PEFT tells its two forms of a rank pattern's keys apart by whether the adapter's name is
    somewhere in them: with the name "fc", which is also in "fc0", saving fails."""
    model = adapter_called_fc()
    train_ten_steps(model)
    with fails(KeyError, "lora_E"):
        model.save_pretrained(tmp_path)


def test_10_adapter_name_in_a_module_path_ours(tmp_path):
    """We cut the end off the key. Plain PEFT loads the file under another name, and with ours
    enabled under the same one."""
    model = adapter_called_fc()
    apply(model)
    train_ten_steps(model)
    assert alive(model) == kept(model, "fc") == TARGET
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = [PeftModel.from_pretrained(Net(), tmp_path / "fc").eval()]
    torch.manual_seed(0)
    with enabled():
        loaded += [PeftModel.from_pretrained(Net(), tmp_path / "fc", adapter_name="fc").eval()]
    x, _ = batch(1)
    for other in loaded:
        assert alive(other) == TARGET
        torch.testing.assert_close(other(x).logits, model.eval()(x).logits)


def inference_adapter_first(prepare=as_it_is):
    options = {"init_r": 6, "target_r": 3, "total_step": 10, "target_modules": ["fc0", "fc1"]}
    first = AdaLoraConfig(inference_mode=True, **options)
    model = get_peft_model(Net(), first, adapter_name="first").train()
    prepare(model)
    model.add_adapter("second", AdaLoraConfig(**options))
    model.set_adapter("second")
    return model


def test_10_inference_adapter_first_peft():
    """PEFT makes its allocator with the first adapter only: the one to be trained has none."""
    model = inference_adapter_first()
    with fails(AttributeError, "trainable_adapter_name"):
        train_ten_steps(model)


@pytest.mark.parametrize("when", ["before", "after"])
def test_10_inference_adapter_first_ours(when):
    """Ours is made for the trainable adapter, whenever that came, and leaves the other alone."""
    model = inference_adapter_first(apply if when == "before" else as_it_is)
    if when == "after":
        apply(model)
    others = {n: p.clone() for n, p in model.named_parameters() if n.endswith(".first")}
    train_ten_steps(model)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[n], p) for n, p in others.items()) and len(others) == 8
    assert kept(model, "second") == 6
    assert alive(model) == 6, "the first adapter's are still 0"


def past_the_final_step(steps, prepare=as_it_is):
    """Step 6, at which the pattern becomes final, is not among `steps`."""
    model = make(total_step=10, tfinal=4)
    prepare(model)
    for value in singular_values(model).values():
        nn.init.normal_(value)
    x, labels = batch(1)
    for step in steps:
        model.base_model(x, labels=labels).loss.backward()
        model.base_model.update_and_allocate(step)
        model.zero_grad()
    return model


def test_10_jump_past_the_final_step_peft():
    """Without its call at the very step total_step - tfinal, PEFT has no final pattern: it goes on
    with that of an earlier step, over the budget; and fails if there is none."""
    defect(alive(past_the_final_step([1, 2, 8])) > TARGET)
    with fails(AttributeError, "NoneType"):
        past_the_final_step([8])


@pytest.mark.parametrize("steps", [[1, 2, 8], [8]], ids=str)
def test_10_jump_past_the_final_step_ours(steps):
    """Our pattern becomes final at the first call at or after that step."""
    model = past_the_final_step(steps, apply)
    assert alive(model) == kept(model) == TARGET


def first_layer_only(prepare=as_it_is):
    """Two steps of a training in which only fc0 is used."""
    model = make(total_step=2)
    prepare(model)
    for value in singular_values(model).values():
        nn.init.normal_(value)
    x, _ = batch(1)
    for step in (1, 2):
        model.base_model.model.fc0(x).square().sum().backward()
        model.base_model.update_and_allocate(step)
    return model


def test_11_parameter_without_a_gradient_peft():
    """PEFT multiplies every parameter by its gradient, also where that is None."""
    with fails(TypeError, "NoneType"):
        first_layer_only()


def test_11_parameter_without_a_gradient_ours():
    """What is not trained keeps its values, and the others share what is theirs of the budget."""
    model = first_layer_only(apply)
    ranks = [int(value.count_nonzero()) for value in singular_values(model).values()]
    assert ranks == [TARGET // 3, 6, 6]


def attempt(function, *args):
    """What came out: "" or the error."""
    try:
        function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    return ""


def token_ids(step, rank):
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randint(0, 32, (2, 8), generator=generator)


def parallel(kind, model):
    """In DDP with reentrant checkpointing, or sharded by FSDP2."""
    if kind == "ddp":
        model.enable_input_require_grads()
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": True})
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train_in_parallel(wrapped, model, rank):
    optimizer = optimizer_of(model, "adamw")
    if allocator_of(model) is not None:
        allocator_of(model).attach(optimizer)
    for step in range(1, 11):
        ids = token_ids(step, rank)
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def go_parallel():
    """How each kind went with PEFT and with ours, in each of two processes."""
    warnings.simplefilter("ignore")
    report, rank = {}, dist.get_rank()
    for name, kind, prepare, options in (
        ("ddp_peft", "ddp", as_it_is, {}),
        ("ddp_ours", "ddp", apply, {}),
        ("fsdp2_peft", "fsdp2", as_it_is, {}),
        ("fsdp2_ours", "fsdp2", apply, {}),
        ("fsdp2_ours_without_regulariser", "fsdp2", apply, {"orth_reg_weight": 0.0}),
    ):
        model = tiny_llama(**options)
        prepare(model)
        report[name] = attempt(train_in_parallel, parallel(kind, model), model, rank)
        if not report[name]:
            options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True)
            state = get_model_state_dict(model, options=options)  # From rank 0 if it is sharded.
            if kind == "fsdp2":
                report[f"{name}_refused"] = attempt(get_peft_model_state_dict, model)
            values = get_peft_model_state_dict(model, state).values() if state else []
            report[f"{name}_kept"] = kept(model), sum(float(p.double().sum()) for p in values)
        dist.barrier()
    return report


@pytest.fixture(scope="module")
def two_processes():
    """What both processes report."""
    return on_ranks(2, "test_incumbent_defects:go_parallel")


@pytest.mark.full
def test_12_ddp_with_reentrant_checkpointing_peft(two_processes):
    """The loss touches lora_A and lora_B once in a checkpointed layer and once in the regulariser
    outside of it; DDP can't reduce a gradient that comes twice."""
    defect(all("mark a variable ready only once" in r["ddp_peft"] for r in two_processes))


def test_12_ddp_with_reentrant_checkpointing_ours(two_processes):
    """Our regulariser is in no loss: its gradient is added when all have been reduced."""
    assert [r["ddp_ours"] for r in two_processes] == ["", ""]
    first, second = (r["ddp_ours_kept"] for r in two_processes)
    assert first == second and first[0] == 8


@pytest.mark.full
def test_12_fsdp2_peft(two_processes):
    """PEFT's regulariser takes the local shard of the Gram matrix, and an identity of full size."""
    defect(all("size of tensor" in r["fsdp2_peft"] for r in two_processes))


@pytest.mark.full
def test_12_fsdp2_ours(two_processes):
    """Scores and Gram matrices are those of whole triplets; test_distributed_shards.py has more."""
    for name in ("fsdp2_ours", "fsdp2_ours_without_regulariser"):
        first, second = (report[f"{name}_kept"][0] for report in two_processes)
        assert [report[name] for report in two_processes] == ["", ""]
        assert first == second == 8
        for report in two_processes:
            assert re.search("gather it first", report[f"{name}_refused"])


def pruned_to_rank_0(prepare=as_it_is):
    model = make(tinit=3, tfinal=5, target_r=1)
    prepare(model)
    train(model, optimizer_of(model, "adamw"), range(1, 31))
    ranks = [int(values.count_nonzero()) for values in singular_values(model).values()]
    assert sum(ranks) == 3 and 0 in ranks and max(ranks) > 1
    return model


def test_13_conversion_to_lora_peft():
    """PEFT's convert_to_lora refuses AdaLoRA, which servers of LoRA adapters don't know."""
    model = pruned_to_rank_0()
    with fails(TypeError, "SVDLinear"):
        convert_to_lora(model, rank=8)


def test_13_conversion_to_lora_ours(tmp_path):
    """It is a LoRA exactly: lora_B times lora_E and the scaling, with a rank for each layer."""
    model = pruned_to_rank_0(apply)
    export_lora(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), tmp_path).eval()
    x, _ = batch(1)
    torch.testing.assert_close(loaded(x).logits, model.eval()(x).logits)
    ranks = [p.shape[0] for n, p in loaded.named_parameters() if "lora_A" in n]
    assert sum(ranks) == 3 and 0 not in ranks


class MergingTwin(TwinLinear):
    """With the authors' way of merging: `eval()` merges, `train(...)` undoes it."""

    merged = False

    def _add_to_weight(self, sign):
        delta = self.lora_B @ (self.lora_A * self.lora_E) * self.scale / (self.ranknum + 1e-5)
        self.weight.data += sign * delta

    def train(self, mode=True):
        super().train(mode)
        if self.merged:
            self._add_to_weight(-1)
            self.merged = False
        return self

    def eval(self):
        super().eval()
        if not self.merged:
            self._add_to_weight(1)
            self.merged = True
        return self

    def forward(self, x):
        return (
            nn.functional.linear(x, self.weight, self.bias) if self.merged else super().forward(x)
        )


def merged_by_parent(layer):
    """(whether the eval() of a parent merges, how far the output then is off)."""
    nn.init.normal_(layer.lora_E)
    parent, x = nn.Sequential(layer), torch.randn(4, 16)
    y = parent(x)
    parent.eval()
    return layer.merged, (parent(x) - y).abs().max().item()


def test_14_eval_of_a_parent_loralib():
    """The authors override `eval`, but a parent's `eval` calls its children's `train(False)`: no
    layer of a model is ever merged."""
    assert MergingTwin(16, 8, r=4).eval().merged
    merged, error = merged_by_parent(MergingTwin(16, 8, r=4))
    assert not merged and error == 0


def test_14_eval_of_a_parent_ours():
    """We merge in `train(False)`, which is what both call."""
    assert loralib.SVDLinear(16, 8, r=4).eval().merged
    merged, error = merged_by_parent(loralib.SVDLinear(16, 8, r=4))
    assert merged and error < 1e-5
