"""Cases of one layer, and the error rule for them: any implementation against `reference`."""

from functools import partial

import torch
import torch.nn.functional as F
from helpers import adapter, assert_as_good_as_eager

from adalora_kernels import cpu, ops, reference, svd_delta, svd_linear

# The kernels' paths, which only the ops take as an impl.
PATHS = ("two_pass", "fused", "cublas")


def random_case(*, lead=(7,), in_features=13, out_features=9, r=3, dtype=torch.float32, **options):
    """The tensors of one case, drawn on the CPU, so that they are the same everywhere.

    Options: `adapter_dtype`, `bias`, `mask` ("true", "mixed", "false"), `device`.
    """
    A, E, B = adapter(r, in_features, out_features, options.get("adapter_dtype", dtype), False)
    masks = {
        None: None,
        "true": torch.ones(r, dtype=torch.bool),
        "mixed": torch.arange(r) % 2 == 0,
        "false": torch.zeros(r, dtype=torch.bool),
    }
    case = {
        "x": torch.randn(*lead, in_features).to(dtype),
        "weight": torch.randn(out_features, in_features).to(dtype),
        "lora_A": A,
        "lora_E": E,
        "lora_B": B,
        "bias": torch.randn(out_features).to(dtype) if options.get("bias", True) else None,
        "mask": masks[options.get("mask")],
    }
    device = options.get("device", "cpu")
    return {name: t if t is None else t.to(device) for name, t in case.items()}


def eager(x, weight, lora_A, lora_E, lora_B, bias=None, mask=None, keep=None, scaling=1.5):
    """Plain eager PyTorch, whose rounding errors are the measure: PEFT's tuners/adalora/layer.py.

    `keep` (the shape of x) is dropout's mask, already divided by 1 - p.
    """
    y = F.linear(x, weight, bias)
    if mask is not None:
        lora_E = lora_E * mask.unsqueeze(1)
    x = x.to(lora_A.dtype) if keep is None else (x * keep).to(lora_A.dtype)
    return y + ((x @ (lora_A * lora_E).T @ lora_B.T) * scaling).to(y.dtype)


def oracle(x, weight, lora_A, lora_E, lora_B, bias=None, mask=None, keep=None, scaling=1.5):
    """The definition, `reference`, with `keep` as in `eager`."""
    y, dropped = F.linear(x, weight, bias), x if keep is None else x * keep
    return reference.svd_delta(y, dropped, lora_A, lora_E, lora_B, mask, scaling, 0.0, None)[0]


def dropout_keep(x, dropout_p, seed, impl="auto"):
    """What dropout multiplies x with in the stream that `impl` uses for it, in float64."""
    tuned = impl == "auto" and x.device.type == "cpu"
    mask = (cpu.dropout_mask if tuned else reference.philox_mask)(x.double(), dropout_p, seed)
    return mask / (1 - dropout_p)


def generator_states():
    """Of the CPU and of every GPU."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all()


def set_generator_states(states):
    """What `generator_states` returned."""
    torch.set_rng_state(states[0])
    torch.cuda.set_rng_state_all(states[1])


def outputs_and_gradients(run, tensors, grad_y, grad_of=lambda t: t):
    """{name: y and the gradient of every floating tensor but the weight}."""
    leaves = {
        name: t.clone().requires_grad_()
        for name, t in tensors.items()
        if t is not None and t.is_floating_point() and name != "weight"
    }
    y = run(**{**tensors, **leaves})
    grads = torch.autograd.grad(y, list(leaves.values()), grad_of(grad_y.to(y.dtype)))
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def results(tensors, dropout_p=0.0, grad_of=lambda t: t, impl="auto"):
    """The results of {"fused", "opaque"}, plain eager's, the oracle's, and their magnitude.

    The magnitude is the oracle of absolute values: the sum of |terms| that rounding errors scale
    with, where a result itself may be small because its terms cancel.
    """
    doubles = {k: t.double() if t is not None and k != "mask" else t for k, t in tensors.items()}
    absolute = {k: t.abs() if t is not None and k != "mask" else t for k, t in doubles.items()}
    x, keep, rounded = tensors["x"], None, None
    state = generator_states()
    if dropout_p:
        keep = dropout_keep(x, dropout_p, ops.dropout_seed(x), impl)
        rounded = keep.to(x.dtype)
    g = torch.randn(*x.shape[:-1], tensors["weight"].shape[0]).to(x)
    plain = outputs_and_gradients(partial(eager, keep=rounded), tensors, g, grad_of)
    exact = outputs_and_gradients(partial(oracle, keep=keep), doubles, g, grad_of)
    magnitude = outputs_and_gradients(partial(oracle, keep=keep), absolute, g.abs(), grad_of)

    def fused(x, weight, lora_A, lora_E, lora_B, **rest):
        if impl in PATHS:
            seed = ops.dropout_seed(x) if dropout_p else None
            tensors = (x, weight, rest["bias"], lora_A, lora_E, lora_B, rest["mask"])
            return torch.ops.adalora.svd_linear(*tensors, 1.5, dropout_p, seed, impl)[0]
        return svd_linear(
            *(x, weight, lora_A, lora_E, lora_B),
            **rest,
            scaling=1.5,
            dropout_p=dropout_p,
            impl=impl,
        )

    def opaque(x, weight, lora_A, lora_E, lora_B, bias, mask):
        return svd_delta(
            F.linear(x, weight, bias),
            *(x, lora_A, lora_E, lora_B),
            mask=mask,
            scaling=1.5,
            dropout_p=dropout_p,
            impl=impl,
        )

    actual = {}
    for run in (fused,) if impl in PATHS else (fused, opaque):
        set_generator_states(state)
        actual[run.__name__] = outputs_and_gradients(run, tensors, g, grad_of)
    return actual, plain, exact, magnitude


def check_against_float64(*draws, dropout_p=0.0, grad_of=lambda t: t, impl="auto", skip=()):
    """The error rule for y and every gradient but those in `skip`, over draws of one case."""
    samples = [results(tensors, dropout_p, grad_of, impl) for tensors in draws]
    for run in samples[0][0]:
        for name in samples[0][2].keys() - set(skip):
            of_draws = [
                (actual[run][name], plain[name], exact[name]) for actual, plain, exact, _ in samples
            ]
            actual, plain, exact = (torch.stack(column) for column in zip(*of_draws, strict=True))
            assert_as_good_as_eager(actual, plain, exact, f"{run} {name}")


CASES = {
    **{f"rank_{r}": {"r": r} for r in (1, 3, 8, 12, 16, 33, 64)},
    "no_rows": {"lead": (0,)},
    "one_row": {"lead": (1,)},
    "x_1d": {"lead": ()},
    "x_3d": {"lead": (2, 5)},
    "x_4d": {"lead": (2, 3, 5)},
    "x_3d_no_rows": {"lead": (2, 0)},
    "odd": {"lead": (17,), "in_features": 31, "out_features": 23, "r": 5},
    "wide": {"lead": (65,), "in_features": 48, "out_features": 96, "r": 8},
    "no_bias": {"bias": False},
    "mask_all_true": {"mask": "true"},
    "mask_mixed": {"mask": "mixed"},
    "mask_all_false": {"mask": "false"},
    "bf16": {"dtype": torch.bfloat16},
    "fp16": {"dtype": torch.float16},
    "fp32_adapter_bf16_base": {"dtype": torch.bfloat16, "adapter_dtype": torch.float32},
    "fp32_adapter_fp16_base": {"dtype": torch.float16, "adapter_dtype": torch.float32},
}
