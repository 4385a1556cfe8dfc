"""LightningModules and Trainers for test_lightning.py."""

import itertools
import logging
import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from trainer_runs import BATCH, STEPS, make, rows, trainable

from adalora_kernels.lightning import AdaLoraCallback

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Module(pl.LightningModule):
    """Trains a PEFT model, as people write it."""

    def __init__(self, model=None, fused=False):
        super().__init__()
        self.model, self.fused = model or make(), fused
        self.losses, self.scores = [], {}

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("score", self.scores.get(self.trainer.global_step, 0.0))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.model(**batch).loss)

    def configure_optimizers(self):
        parameters = trainable(self).values()
        return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0, fused=self.fused)


class Manual(Module):
    """Steps two optimizers by hand, of which the second has the adapters."""

    def __init__(self, model=None, every=1, **options):
        super().__init__(model, **options)
        self.automatic_optimization = False
        self.every = every
        self.bias = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        loss = super().training_step(batch, batch_idx) + self.bias.square()
        self.manual_backward(loss / self.every)
        if (batch_idx + 1) % self.every == 0:
            for optimizer in (first, second):
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self):
        parameters = trainable(self.model).values()
        adapters = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0, fused=self.fused)
        return torch.optim.SGD([self.bias], lr=0.1), adapters


class Records(Logger):
    """A logger that keeps what it is given."""

    name = version = "records"

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))

    def log_hyperparams(self, params, *args, **kwargs):
        pass


class Loader(torch.utils.data.DataLoader):
    """Goes on where it was when a checkpoint was saved: Lightning asks loaders that can."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.seen = self.skipped = 0

    def __iter__(self):
        self.seen, self.skipped = self.skipped, 0
        for batch in itertools.islice(super().__iter__(), self.seen, None):
            self.seen += 1
            yield batch

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.skipped = state["seen"]


def data(n=STEPS * BATCH, size=BATCH):
    return Loader(rows(n), batch_size=size)


def lightning_trainer(out=None, *, callbacks=None, every=None, cls=pl.Trainer, **options):
    """A quiet Trainer of STEPS steps, with checkpoints in `out` after every `every` of them."""
    callbacks = [AdaLoraCallback()] if callbacks is None else list(callbacks)
    if every:
        callbacks.append(
            ModelCheckpoint(out, "{step}", every_n_train_steps=every, save_top_k=-1, monitor=None)
        )
    arguments = {
        "max_steps": STEPS,
        "logger": False,
        "enable_checkpointing": bool(every),
        "log_every_n_steps": 1,
        "gradient_clip_val": 1.0,
        **options,
    }
    return cls(
        accelerator="cpu",
        devices=arguments.pop("devices", 1),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **arguments,
    )


def fit(trainer, module, loader=None, **options):
    """Fits, without Lightning's remarks about workers, epochs and layers in evaluation mode."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning|pytorch_lightning")
        trainer.fit(module, data() if loader is None else loader, **options)
    return module
