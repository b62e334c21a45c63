"""Precisions that a processor cannot do well are named before the run begins."""

import pytest
import torch

from training.precision import slow_here

CPU = torch.device("cpu")


@pytest.mark.parametrize("supported", [True, False])
def test_bfloat16_without_its_instructions_is_told(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    told = slow_here(CPU, "bf16")
    assert told is None if supported else told is not None and "--precision fp32" in told
    assert slow_here(CPU, "fp32") is None
    assert slow_here(torch.device("cuda"), "bf16") is None
