"""The full training step of ViT-B, lowered for machines that are not at hand."""

import pytest

from benchmarks.memory import lower, read_config


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1, 1), (64, 2, 2)], ids=["8 devices", "256 devices"])
def test_vit_b_lowers_for_tpu_and_cuda(shape):
    config = read_config("configs/vit_b_gaudi.py", "recipe=budget")
    assert config.data.batch_size == 1024
    lowered = lower(config, shape, ("tpu", "cuda"))
    for text in lowered.values():
        assert f"mhlo.num_partitions = {shape[0] * shape[1] * shape[2]}" in text
        assert "tensor<1024x224x224x3xui8>" in text
