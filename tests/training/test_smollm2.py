"""A real pretrained model under every engine; needs models/smollm2-135m (python launch/fetch.py model smollm2-135m)."""

from pathlib import Path

import pytest
from distributed_runs import TinyRuns, assert_same_curve, losses

MODEL = Path(__file__).parents[2] / "models" / "smollm2-135m"


@pytest.mark.long
@pytest.mark.skipif(not MODEL.is_dir(), reason=f"no {MODEL.name} in models/: python launch/fetch.py model {MODEL.name}")
def test_a_real_model_learns_the_same_under_every_engine(tmp_path: Path) -> None:
    runs = TinyRuns(MODEL, tmp_path)
    # The tiny recipe's learning rate throws a real model far off, where rounding grows from step to step.
    few = ("train.max_steps=4", "train.global_batch_size=4", "adapter.k=20", "optimizer.lr=1e-3")
    folders = {
        (engine, ranks): runs.add(f"{engine}x{ranks}", engine, ranks, *few)
        for engine, ranks in (("single", 1), ("zero2", 2), ("zero3", 2), ("fsdp2", 2))
    }
    runs.run()
    expected = losses(folders["single", 1])
    assert len(expected) == 4
    for folder in folders.values():
        assert_same_curve(losses(folder), expected)
