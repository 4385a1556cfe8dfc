"""One model, one function: what stands in lora_E is what runs, is merged, saved and exported.

Earlier or averaged weights are put into a model whose ranks are final.
"""

import copy

import hands
import pytest
import torch
from helpers import batch, triplets_in
from peft import (
    AdaLoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import Trainer, TrainingArguments

import adalora_kernels.peft
from adalora_kernels.export import export_lora, load_adapter, save_adapter

STEPS, BEST = 12, 4
full = pytest.mark.full


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.fc0, self.fc1, self.fc2 = nn.Linear(16, 24), nn.Linear(24, 20), nn.Linear(20, 8)

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(torch.tanh(self.fc0(x)))))


def make(**options):
    schedule = {"init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 3, "total_step": STEPS}
    config = AdaLoraConfig(**schedule, target_modules=["fc0", "fc1", "fc2"], **options)
    return get_peft_model(Net(), config)


def y_of(model):
    with torch.no_grad():
        return model.eval()(batch(0)[0])


class Run:
    """A training to the final ranks, and what is kept of its best step and its average."""

    def __init__(self, folder):
        self.folder = folder
        self.model = make()
        self.allocator = adalora_kernels.peft.apply(self.model).allocator
        optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=3e-2
        )
        self.allocator.attach(optimizer)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.7))
        for step in range(1, STEPS + 1):
            x, target = batch(step)
            (self.model.train()(x) - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            self.average.update_parameters(self.model)
            if step == BEST:
                self.best_y = y_of(self.model)
                self.best = copy.deepcopy(self.model.state_dict())
                self.best_adapter = copy.deepcopy(get_peft_model_state_dict(self.model))
                self.model.save_pretrained(folder / "best")
        assert self.allocator.frozen and sum(self.allocator.ranks().values()) == 6


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("run"))


def load_best(run, model):
    model.load_state_dict(run.best)
    return run.best_y


def assign_best(run, model):
    model.load_state_dict(copy.deepcopy(run.best), assign=True)
    return run.best_y


def set_best_adapter(run, model):
    set_peft_model_state_dict(model, run.best_adapter)
    return run.best_y


def load_best_adapter(run, model):
    model.load_adapter(run.folder / "best", "default", is_trainable=True)
    return run.best_y


def swap_averages_in(run, model):
    state = {n: p.detach().clone() for n, p in run.average.module.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[name])
    return y_of(run.average)


def load_averages(run, model):
    model.load_state_dict(run.average.module.state_dict())
    return y_of(run.average)


def write_one_value(run, model):
    """Of a triplet that was pruned for good."""
    layer = model.base_model.model.fc0
    pruned = int((layer.lora_E["default"] == 0).nonzero()[0, 0])
    before = y_of(model)
    layer.lora_E["default"].data[pruned] = 3.0
    with torch.no_grad():
        x = batch(0)[0]
        fc0 = layer.get_base_layer()(x) + x @ layer.get_delta_weight("default").T
        net = model.base_model.model
        expected = net.fc2(torch.tanh(net.fc1(torch.tanh(fc0))))
    assert (expected - before).abs().max() > 1e-3
    return expected


WAYS = [
    load_best,
    pytest.param(assign_best, marks=full),
    set_best_adapter,
    load_best_adapter,
    swap_averages_in,
    pytest.param(load_averages, marks=full),
    write_one_value,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_whatever_is_loaded_is_the_function(way, finished, tmp_path):
    model = copy.deepcopy(finished.model)
    expected = way(finished, model)
    torch.testing.assert_close(y_of(model), expected)
    torch.testing.assert_close(y_of(copy.deepcopy(model)), expected)
    model.merge_adapter()
    torch.testing.assert_close(y_of(model), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(y_of(copy.deepcopy(model).merge_and_unload()), expected)

    model.save_pretrained(tmp_path / "peft")
    save_adapter(model, tmp_path / "compact")
    save_adapter(model, tmp_path / "checkpoint", full_rank=True)
    export_lora(model, tmp_path / "lora")
    for folder in ("peft", "compact", "checkpoint", "lora"):
        plain = PeftModel.from_pretrained(Net(), tmp_path / folder)
        torch.testing.assert_close(y_of(plain), expected, msg=folder)
    state = get_peft_model_state_dict(model)
    for other in (make(), copy.deepcopy(finished.model)):
        set_peft_model_state_dict(other, state)
        torch.testing.assert_close(y_of(other), expected)
    for folder in ("peft", "compact", "checkpoint"):
        other = make()
        adalora_kernels.peft.apply(other)
        load_adapter(other, tmp_path / folder)
        torch.testing.assert_close(y_of(other), expected, msg=folder)


def test_the_final_pattern_is_written_again_by_the_next_step(finished):
    """What trains on is pruned again: a pattern is kept by its zeros, not by a mask."""
    model = copy.deepcopy(finished.model)
    allocator = adalora_kernels.peft.allocator_of(model)
    load_best(finished, model)
    allocator.step(STEPS + 1)
    for adapter in allocator.adapters:
        alive = torch.tensor(allocator.rank_pattern[adapter.name])
        assert not adapter.lora_E[~alive].any()
    assert not torch.equal(y_of(model), finished.best_y)


@pytest.mark.parametrize("what", ["best", "average"])
def test_a_state_that_is_handed_to_save_pretrained_decides(what, finished, tmp_path):
    """Not the model that happens to be there: EMA weights are saved like this."""
    state, expected = finished.best, finished.best_y
    if what == "average":
        state, expected = finished.average.module.state_dict(), y_of(finished.average)
    finished.model.save_pretrained(tmp_path, state_dict=state)
    torch.testing.assert_close(y_of(PeftModel.from_pretrained(Net(), tmp_path)), expected)
    # And the other way round: the state is pruned, the model has earlier weights.
    pruned, y = finished.model.state_dict(), y_of(finished.model)
    model = copy.deepcopy(finished.model)
    load_best(finished, model)
    model.save_pretrained(tmp_path, state_dict=pruned)
    torch.testing.assert_close(y_of(PeftModel.from_pretrained(Net(), tmp_path)), y)
    assert sum(triplets_in(tmp_path).values()) == 6


def shrunk(run):
    model = copy.deepcopy(run.model)
    allocator = adalora_kernels.peft.allocator_of(model)
    allocator.shrink()
    ranks = [len(a.lora_E) for a in allocator.adapters]
    assert sum(ranks) == 6 and y_of(model).isfinite().all()
    return model


def scramble(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()


@pytest.mark.parametrize("writer", ["itself", "not_shrunk"])
@pytest.mark.parametrize("way", ["state", "folder"])
def test_a_shrunk_model_reads_what_it_and_others_write(way, writer, finished, tmp_path):
    """A file has all init_r rows; the layers take those that they hold."""
    model, expected = shrunk(finished), y_of(finished.model)
    writer = model if writer == "itself" else finished.model
    writer.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {len(t) for name, t in saved.items() if "lora_E" in name} == {6}
    state = {name: t.clone() for name, t in get_peft_model_state_dict(writer).items()}
    scramble(model)
    if way == "state":
        set_peft_model_state_dict(model, state)
    else:
        model.load_adapter(tmp_path, "default", is_trainable=True)
    torch.testing.assert_close(y_of(model), expected)


def test_a_model_that_was_loaded_compact_reads_and_writes_all_rows(finished, tmp_path):
    """Its layers hold fewer rows, which go where the rank_pattern says."""
    expected = y_of(finished.model)
    finished.model.save_pretrained(tmp_path / "whole")
    save_adapter(finished.model, tmp_path / "compact")
    for trainable in (False, True):
        plain = PeftModel.from_pretrained(Net(), tmp_path / "compact", is_trainable=trainable)
        for model in (plain, copy.deepcopy(plain)):
            if model is not plain:
                adalora_kernels.peft.apply(model)
                model.save_pretrained(tmp_path / "again")
                for name, tensor in load_file(
                    tmp_path / "whole" / "adapter_model.safetensors"
                ).items():
                    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
                    assert torch.equal(again[name], tensor)
                torch.testing.assert_close(
                    y_of(PeftModel.from_pretrained(Net(), tmp_path / "again")), expected
                )
                set_peft_model_state_dict(model, get_peft_model_state_dict(model))
            scramble(model)
            load_adapter(model, tmp_path / "whole")
            torch.testing.assert_close(y_of(model), expected)


def test_layers_that_keep_pefts_forward_read_all_rows_too():
    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 8, (4, 4))

        def forward(self, x):
            return self.conv(x.reshape(-1, 1, 4, 4)).flatten(1)

    config = AdaLoraConfig(init_r=6, target_r=2, tfinal=3, total_step=6, target_modules=["conv"])
    model = get_peft_model(Conv(), config)
    allocator = adalora_kernels.peft.apply(model).allocator
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    for step in range(1, 7):
        x, target = batch(step)
        (model(x) - target).square().mean().backward()
        optimizer.step()
        allocator.step(step)
        optimizer.zero_grad()
    expected = y_of(model)
    allocator.shrink()
    state = {name: t.clone() for name, t in get_peft_model_state_dict(model).items()}
    assert {len(t) for name, t in state.items() if "lora_E" in name} == {6}
    scramble(model)
    set_peft_model_state_dict(model, state)
    torch.testing.assert_close(y_of(model), expected)


def test_a_shrunk_model_has_no_room_for_earlier_weights(finished):
    model = shrunk(finished)
    with pytest.raises(RuntimeError, match="size mismatch"):
        set_peft_model_state_dict(model, finished.best_adapter)


def test_trainer_save_model_after_restoring(tmp_path):
    """A Trainer hands its model's state over as it saves."""
    model = hands.adapted()
    optimizer = hands.adamw(model, lr=3e-2)
    hands.take_over("ours", model, optimizer)
    hands.train("ours", model, optimizer, range(1, BEST + 1))
    best, expected = copy.deepcopy(model.state_dict()), hands.logits(model)
    hands.train("ours", model, optimizer, range(BEST + 1, hands.STEPS + 1))
    model.load_state_dict(best)
    trainer = Trainer(model, TrainingArguments(tmp_path / "out", report_to=[], use_cpu=True))
    trainer.save_model(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(hands.llama(), tmp_path / "saved")
    torch.testing.assert_close(hands.logits(loaded), expected)
