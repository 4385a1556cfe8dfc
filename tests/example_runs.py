"""The example of several processes under Accelerate with FSDP2, which it takes on GPUs only."""

import importlib
import sys
from pathlib import Path
from unittest import mock

import torch.distributed as dist
import yaml
from accelerate import Accelerator
from engines_runs import told_of_fsdp

EXAMPLES = Path(__file__).parent.parent / "examples"


def with_fsdp2(out):
    """Run the script; Accelerate is told of FSDP2 by hand. Returns what it was told."""
    sys.path.insert(0, str(EXAMPLES))
    script = importlib.import_module("several_processes")
    fsdp = yaml.safe_load((EXAMPLES / "accelerate_fsdp2.yaml").read_text())["fsdp_config"]
    block = fsdp["fsdp_transformer_layer_cls_to_wrap"]
    options = {"reshard_after_forward": fsdp["fsdp_reshard_after_forward"]}
    options["cpu_ram_efficient_loading"] = fsdp["fsdp_cpu_ram_efficient_loading"]
    options["state_dict_type"] = fsdp["fsdp_state_dict_type"]

    def told(cpu):
        return told_of_fsdp(Accelerator(cpu=cpu), block, **options)

    argv = ["several_processes.py", "--engine", "accelerate", "--out", out]
    # ranks.py ends the group.
    with (
        mock.patch.object(script, "Accelerator", told),
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(script, "GPU", False),
        mock.patch.object(dist, "destroy_process_group"),
    ):
        script.main()
    return fsdp
