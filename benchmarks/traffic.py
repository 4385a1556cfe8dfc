"""What a step with sharded adapters sends: `python -m benchmarks.traffic` counts it.

The adapters have the shapes of a real model, and torch's fake backend stands for the other
processes: it sends nothing and returns at once, so that one process counts what one of 64 would
send. tests/test_distributed_shards.py holds the same formulas to real processes.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from adalora_kernels import RankAllocator, orth_reg_grad_

R = 12
# Each linear layer of a block, (in, out), and the number of blocks.
MODELS: dict[str, tuple[int, list[tuple[int, int]]]] = {
    "Llama-2-7B": (32, 4 * [(4096, 4096)] + 2 * [(4096, 11008)] + [(11008, 4096)]),
    "Llama-2-70B": (
        80,
        2 * [(8192, 8192)] + 2 * [(8192, 1024)] + 2 * [(8192, 28672)] + [(28672, 8192)],
    ),
}
CASES = [("Llama-2-7B", 8), ("Llama-2-70B", 64)]


class CountSent(TorchDispatchMode):
    """Writes down what this process sends: (collective, bytes), as ring algorithms send it.

    Attributes:
        sent: the collectives in turn. Of those that nobody here uses the bytes are None.
        waits: the ops that wait for a device, where the tensors are on one.
    """

    _WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, float | None]] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        world = dist.get_world_size()
        if namespace == "c10d" and name == "allreduce_":
            (tensor,) = args[0]
            self.sent.append(("all_reduce", 2 * tensor.nbytes * (world - 1) / world))
        elif namespace == "c10d" and name == "_allgather_base_":
            self.sent.append(("all_gather", args[1].nbytes * (world - 1)))
        elif namespace == "c10d":
            self.sent.append((name, None))
        if func._schema.name in self._WAITS:
            self.waits.append(func._schema.name)
        return func(*args, **(kwargs or {}))


class Adapter(nn.Module):
    """The adapter of a layer without the layer, sharded as FSDP2 does it."""

    def __init__(self, in_features: int, out_features: int, mesh: Any, dim_of_A: int) -> None:
        super().__init__()
        for name, shape, dim in (
            ("lora_A", (R, in_features), dim_of_A),
            ("lora_E", (R, 1), 0),
            ("lora_B", (out_features, R), 0),
        ):
            local = list(shape)
            local[dim] = -(-shape[dim] // mesh.size())  # The first process has the most.
            tensor = DTensor.from_local(
                torch.zeros(local), mesh, [Shard(dim)], run_check=False, shape=shape,
                stride=(shape[1], 1),
            )  # fmt: skip
            parameter = nn.Parameter(tensor)
            parameter.grad = torch.zeros_like(parameter)
            setattr(self, name, parameter)


def count(model: str, world: int, placement: str) -> Iterator[dict[str, Any]]:
    """What the first process sends in a step, in one that prunes, and what the formulas say."""
    # There is no public backend that needs no other process.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    blocks, shapes = MODELS[model]
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        mesh = init_device_mesh("cpu", (world,))
        layers = nn.ModuleList(
            Adapter(*shape, mesh, 0 if placement == "rows" else 1) for shape in blocks * shapes
        )
        allocator = RankAllocator(layers, target_r=R // 2, total_step=10, tfinal=2, deltaT=2)
        for step in (1, 2):
            with CountSent() as counted:
                orth_reg_grad_(allocator.adapters, 0.1)
                allocator.step(step)
            yield {
                "model": model,
                "processes": world,
                "r": R,
                "lora_A": placement,
                "step": "prunes" if step == 2 else "learns",
                "sent": counted.sent,
                "formula": formula(blocks * shapes, world, placement, step == 2),
            }
    finally:
        dist.destroy_process_group()


def formula(
    shapes: list[tuple[int, int]], world: int, placement: str, prunes: bool
) -> dict[str, float]:
    """docs/scaling.md: bytes that a process sends, of float32 adapters of rank R."""
    share = (world - 1) / world
    squares = len(shapes) * R * R
    whole = 4 * R * sum(in_features for in_features, _ in shapes)
    padded = -(-R // world) * world / R * whole
    result = {"lora_A": min(padded, 2 * whole) * share} if placement == "rows" else {}
    result["products"] = 8 * squares * share * (1 if placement == "rows" else 2)
    result["flag"] = 8 * share
    if prunes:
        result["scores"] = 4 * R * len(shapes) * (world - 1)
    return result


def main() -> None:
    """Count each case, and write benchmarks/results/traffic/llama.json."""
    # Not above: tests take CountSent from here, and have no use for all that this imports.
    from benchmarks.results import FOLDER, environment

    warnings.simplefilter("ignore")
    rows = [
        row
        for model, world in CASES
        for placement in ("rows", "in")
        for row in count(model, world, placement)
    ]
    for row in rows:
        assert [n for _, n in row["sent"]] == list(row["formula"].values()), row
        print(json.dumps(row))
    path = FOLDER / "traffic" / "llama.json"
    path.parent.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    where = json.dumps(environment(torch.device("cpu")), indent=1)
    path.write_text(f'{{"environment": {where},\n"rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
