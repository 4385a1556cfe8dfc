"""One process is killed: the others end with an error, and the training goes on as if not."""

import re
import signal

import pytest
from ranks import Ended, on_ranks

FULL = pytest.mark.full


@pytest.mark.parametrize(
    ("world", "kind", "place", "step"),
    [
        (2, "sharded", "step", 13),
        pytest.param(4, "sharded", "forward", 14, marks=FULL),
        # The others have begun to write a checkpoint, which is not the last whole one.
        pytest.param(2, "sharded", "save", 15, marks=FULL),
        pytest.param(2, "replicas", "step", 13, marks=FULL),
    ],
)
def test_a_killed_training_goes_on_from_its_last_checkpoint(world, kind, place, step, tmp_path):
    folders = [tmp_path / "killed", tmp_path / "uninterrupted"]
    for folder in folders:
        folder.mkdir()
    # The processes' timeout is 60 s: they notice before that.
    *others, killed = on_ranks(
        world,
        f"killed_runs:train_{kind}",
        {"folder": str(folders[0]), "die": (place, step)},
        seconds=45,
        may_fail=True,
    )
    assert killed == Ended(-signal.SIGKILL, "")
    for other in others:
        assert isinstance(other, Ended) and other.code == 1, other
        assert re.search(r"Connection (closed|reset) by peer", other.error), other.error

    arguments = {"kind": kind, "folder": str(folders[0]), "other_folder": str(folders[1])}
    resumed, uninterrupted = zip(*on_ranks(world, "killed_runs:go_on", arguments), strict=True)
    assert {result["begun"] for result in resumed} == {10}
    assert {result["begun"] for result in uninterrupted} == {0}
    assert len({result["hash"] for result in (*resumed, *uninterrupted)}) == 1
