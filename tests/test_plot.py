"""The pictures are real PNGs, and bad input is refused."""

import json

import pytest
from helpers import Mlp
from matplotlib.image import imread

from adalora_kernels import RankAllocator, plot

RANKS = {
    f"bert.encoder.layer.{layer}.attention.self.{matrix}.lora_E.default": layer + 1
    for layer in range(3)
    for matrix in ("query", "key")
}


def test_cells_are_layer_by_matrix():
    cells = plot._cells(RANKS)
    assert set(cells) == {(i, f"attention.self.{m}") for i in range(3) for m in ("query", "key")}
    both = plot._cells({"encoder.0.q.lora_E": 1, "decoder.0.q.lora_E": 2, "head.lora_E": 3})
    assert both == {(0, "encoder: q"): 1, (0, "decoder: q"): 2, (0, "head"): 3}


@pytest.mark.parametrize("source", ["allocator", "ranks", "saved", "all_zero"])
def test_rank_heatmap(source, tmp_path):
    if source == "saved":
        pattern = {name: [True] * rank + [False] for name, rank in RANKS.items()}
        (tmp_path / "adapter_config.json").write_text(json.dumps({"rank_pattern": pattern}))
    sources = {
        "allocator": RankAllocator(Mlp(), target_r=3, total_step=10),
        "ranks": RANKS,
        "saved": tmp_path,
        "all_zero": dict.fromkeys(RANKS, 0),
    }
    plot.rank_heatmap(sources[source], tmp_path / "ranks.png")
    picture = imread(tmp_path / "ranks.png")
    assert min(picture.shape[:2]) > 200 and picture[..., :3].std() > 0.05


def test_saved_ranks(tmp_path):
    pattern = {name: [True] * rank + [False] for name, rank in RANKS.items()}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"rank_pattern": pattern}))
    assert plot._saved_ranks(tmp_path) == RANKS


def test_budget_curve(tmp_path):
    history = [
        {"step": i, "loss": 1 / i, "budget": 20 - i, "total_rank": None if i % 2 else 20 - i}
        for i in range(1, 10)
    ]
    plot.budget_curve(history, tmp_path / "budget.png")
    assert imread(tmp_path / "budget.png")[..., :3].std() > 0.05


def test_budget_curve_of_a_trainer(tmp_path):
    run = [
        {"step": i, "loss": 1 / i, "adalora/budget": 20 - i, "adalora/total_rank": 20 - i}
        for i in range(1, 10)
    ]
    history = [*run[:5], {"step": 5, "eval_loss": 0.3}, *run[5:], {"step": 9, "train_runtime": 1.0}]
    plot.budget_curve(history, tmp_path / "trainer.png")
    plain = [{key.removeprefix("adalora/"): v for key, v in record.items()} for record in run]
    plot.budget_curve(plain, tmp_path / "plain.png")
    pictures = [imread(tmp_path / f"{name}.png") for name in ("trainer", "plain")]
    assert (pictures[0] == pictures[1]).all()


def test_refusals(tmp_path):
    target = tmp_path / "x.png"
    with pytest.raises(TypeError, match="list"):
        plot.rank_heatmap([1], target)
    with pytest.raises(ValueError, match="no matrix"):
        plot.rank_heatmap({}, target)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        plot.rank_heatmap(tmp_path, target)
    (tmp_path / "adapter_config.json").write_text('{"rank_pattern": null}')
    with pytest.raises(ValueError, match="rank_pattern"):
        plot.rank_heatmap(tmp_path, target)
    with pytest.raises(ValueError, match="empty"):
        plot.budget_curve([], target)
    with pytest.raises(ValueError, match=r"history\[0\] lacks \['budget', 'total_rank'\]"):
        plot.budget_curve([{"step": 1, "loss": 2.0}], target)
    assert not target.exists()
