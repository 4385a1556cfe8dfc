"""What happens to a model in the middle of its training, and who runs the training.

Plain PEFT and ours run the same script side by side, wherever PEFT is right; where it is not, the
test says so.
"""

import copy
import io
import pickle
import warnings

import pytest
import torch
from accelerate import Accelerator
from hands import (
    FINAL,
    STEPS,
    TARGET,
    adamw,
    adapted,
    both_sides,
    config,
    llama,
    logits,
    rank,
    ranks,
    singular_values,
    take_over,
    tokens,
    train,
)
from helpers import trainable
from peft import get_peft_model
from ranks import on_ranks
from torch.multiprocessing import get_context
from torch.utils.data import DataLoader

from adalora_kernels.peft import allocator_of


def generate(model, folder):
    model.eval()
    with torch.no_grad():
        model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=4, do_sample=False)
    model.train()


def merge_and_unmerge(model, folder):
    model.merge_adapter()
    model.eval()
    logits(model)
    model.train()
    model.unmerge_adapter()


def look_at_the_base_model(model, folder):
    with model.disable_adapter():
        logits(model)
        model(**tokens(7))


def save(model, folder):
    model.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "state.pt")


def load_its_own_state(model, folder):
    model.load_state_dict(copy.deepcopy(model.state_dict()))


def copy_and_pickle(model, folder):
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    torch.testing.assert_close(logits(twin), logits(model))
    twin.merge_and_unload()


def another_adapter(model, folder):
    model.add_adapter("other", config(inference_mode=True, init_r=2))
    model.set_adapter("other", inference_mode=True)
    logits(model)
    model.set_adapter("default")
    model.delete_adapter("other")


def freeze_and_thaw(model, folder):
    parameters = trainable(model)
    model.requires_grad_(False)
    logits(model)
    for parameter in parameters:
        parameter.requires_grad_(True)


def ask_for_a_weighted_adapter(model, folder):
    with pytest.raises((TypeError, AttributeError)):
        model.add_weighted_adapter(["default"], [1.0], "sum")


INTERRUPTIONS = [
    generate,
    merge_and_unmerge,
    look_at_the_base_model,
    save,
    load_its_own_state,
    copy_and_pickle,
    another_adapter,
    freeze_and_thaw,
    ask_for_a_weighted_adapter,
]


@both_sides
@pytest.mark.parametrize("interruption", INTERRUPTIONS, ids=lambda f: f.__name__)
def test_the_training_goes_on_as_if_nothing_had_been(side, interruption, tmp_path):
    """In each of the three phases."""
    results = []
    for interrupted in (False, True):
        model = adapted()
        optimizer = adamw(model)
        take_over(side, model, optimizer)
        for step in range(1, STEPS + 1):
            train(side, model, optimizer, [step])
            if interrupted and step in (1, 5, FINAL + 1):
                interruption(model, tmp_path)
        assert rank(model) == TARGET
        results.append((ranks(model), logits(model)))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1])


@both_sides
@pytest.mark.parametrize("at", [5, FINAL + 1])
def test_a_whole_model_in_a_file_is_trained_on(side, at):
    """torch.save(model) in a cell, torch.load in the next session."""
    model = adapted()
    optimizer = adamw(model)
    take_over(side, model, optimizer)
    train(side, model, optimizer, range(1, at + 1))
    file = io.BytesIO()
    torch.save({"model": model, "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    train(side, model, optimizer, range(at + 1, STEPS + 1))
    twin, other = saved["model"], adamw(saved["model"])
    other.load_state_dict(saved["optimizer"])
    if side == "ours":
        allocator_of(twin).attach(other)
    train(side, twin, other, range(at + 1, STEPS + 1))
    assert rank(model) == TARGET
    for name, values in singular_values(twin).items():
        assert torch.equal(values, singular_values(model)[name])
    assert torch.equal(logits(twin), logits(model))


def in_another_process(model, queue):
    torch.set_num_threads(1)
    queue.put(logits(model).tolist())


@pytest.mark.full
@both_sides
def test_a_model_in_a_spawned_process(side):
    model = adapted()
    optimizer = adamw(model)
    take_over(side, model, optimizer)
    train(side, model, optimizer, range(1, FINAL + 2))
    context = get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=in_another_process, args=(model, queue))
    process.start()
    result = torch.tensor(queue.get(timeout=120))
    process.join()
    torch.testing.assert_close(result, logits(model))


@both_sides
def test_zeros_for_gradients_parameter_groups_and_a_scaler(side):
    """zero_grad(set_to_none=False), one learning rate per factor, and a GradScaler that skips."""
    model = adapted()
    groups = [
        {"params": [p for n, p in model.named_parameters() if factor in n], "lr": lr}
        for factor, lr in (("lora_A", 1e-3), ("lora_E", 1e-2), ("lora_B", 1e-3))
    ]
    optimizer = torch.optim.AdamW(groups)
    allocator = take_over(side, model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    step = 0
    for i in range(STEPS + 1):
        scaler.scale(model(**tokens(i)).loss).backward()
        if i == 4:
            trainable(model)[0].grad[0, 0] = torch.inf
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= scale:
            step += 1
            if side == "peft":
                model.base_model.update_and_allocate(step)
        optimizer.zero_grad(set_to_none=False)
    assert (step, rank(model)) == (STEPS, TARGET)
    if side == "ours":
        assert allocator.global_step == STEPS


@both_sides
def test_tied_weights(side):
    """The adapter of a head that shares its weight with the embedding."""
    base = llama()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config(target_modules=["q_proj", "v_proj", "lm_head"])).train()
    optimizer = adamw(model)
    take_over(side, model, optimizer)
    train(side, model, optimizer)
    assert rank(model) == 15
    head = model.base_model.model.lm_head
    assert head.base_layer.weight is model.get_input_embeddings().weight


@both_sides
def test_accelerate_saves_and_loads_a_run(side, tmp_path):
    """prepare, accumulate, save_state and load_state, in a second model of another process."""
    finals = []
    for resumed in (False, True):
        model = adapted()
        optimizer = adamw(model)
        allocator = take_over(side, model, optimizer)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        wrapped, prepared = accelerator.prepare(model, optimizer)
        if allocator is not None:
            accelerator.register_for_checkpointing(allocator)
        start = 1
        if resumed:
            accelerator.load_state(tmp_path)
            start = 6
        for step in range(start, STEPS + 1):
            for half in range(2):
                with accelerator.accumulate(wrapped):
                    accelerator.backward(wrapped(**tokens(2 * step + half)).loss)
                    prepared.step()
                    if half and side == "peft":
                        model.base_model.update_and_allocate(step)
                    prepared.zero_grad()
            if step == 5 and not resumed:
                accelerator.save_state(tmp_path)
        assert rank(model) == TARGET
        finals.append(logits(model))
    if side == "ours":  # PEFT's allocator forgets its averages.
        assert torch.equal(*finals)


# Lightning


def lightning_module(side, how):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = adapted()
            self.allocator = take_over(side, self.net)

        def training_step(self, batch, index):
            return self.net(**batch).loss

        def validation_step(self, batch, index):
            # The first epoch, of four steps, is the best one.
            self.log("val_loss", float(1 + self.current_epoch))

        def configure_optimizers(self):
            optimizer = adamw(self.net)
            if how == "attach":
                self.allocator.attach(optimizer)
            return optimizer

        def on_train_batch_end(self, *args):
            if how == "by hand":
                self.net.base_model.update_and_allocate(self.global_step)

    return Module()


def fit(module, folder, callbacks=(), **options):
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint

    rows = [{k: v[0] for k, v in tokens(i, 1).items()} for i in range(8)]
    best = ModelCheckpoint(folder, monitor="val_loss", save_top_k=-1)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        callbacks=[best, *callbacks],
        **quiet,
        **options,
    )
    loader = DataLoader(rows, batch_size=2)
    trainer.fit(module, loader, DataLoader(rows[:2], batch_size=2))
    return trainer, best


@pytest.mark.parametrize(
    ("side", "how"),
    [("peft", "by hand"), ("ours", "by hand"), ("ours", "attach"), ("ours", "callback")],
)
def test_lightning(side, how, tmp_path):
    """It gives every optimizer a closure; at the end the best weights are loaded."""
    module = lightning_module(side, how)
    callbacks = []
    if how == "callback":
        from adalora_kernels.lightning import AdaLoraCallback

        callbacks = [AdaLoraCallback()]
    _, best = fit(module, tmp_path, callbacks)
    assert rank(module.net) == TARGET
    state = torch.load(best.best_model_path, weights_only=False)["state_dict"]
    module.load_state_dict(state)
    assert rank(module.net) > TARGET
    expected = logits(module.net)
    merged = copy.deepcopy(module.net).merge_and_unload()
    torch.testing.assert_close(logits(merged), expected)


# Several processes


def test_two_processes_ours():
    """PEFT raises here: it has no gradient to multiply with."""
    first, second = on_ranks(2, "hands_runs:routed")
    assert first == second, "the same triplets everywhere"
    alive = [sum(pattern) for pattern in first.values()]
    assert alive[2] == 4 and sum(alive) == 8, "an expert that nobody asks stays as it is"
