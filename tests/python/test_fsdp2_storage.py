"""quant_storage under FSDP2: the bytes of a weight that was cut, gathered, cast around and saved; on CPU processes."""

import sharding_workers as base
import storage_workers as workers


def test_gathered_bytes_and_results(tmp_path):
    """Every bit pattern, NaN included, for every storage dtype, with and without mixed precision."""
    base.run(workers.several, 2, tmp_path, workers.gathered, workers.refused)


def test_training_and_casts(tmp_path):
    base.run(workers.several, 2, tmp_path, workers.training, workers.casts)


def test_checkpoints(tmp_path):
    base.run(workers.several, 2, tmp_path, workers.checkpoints)
