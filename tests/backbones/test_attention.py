"""Attention and patches as products: the same numbers as torch's own, forward and back."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from backbones import attention
from backbones.attention import attend
from tests.backbones.nets import small_vit

SCALE = 16**-0.5


@pytest.fixture(autouse=True)
def gradients() -> Iterator[None]:
    """The tests of this folder run without them otherwise."""
    with torch.enable_grad():
        yield


def output_and_gradients(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, own: bool) -> list[Tensor]:
    """The output of attention in this type, and the gradients of a loss that weighs each of its numbers otherwise; float32."""
    leaves = [x.detach().clone().to(dtype).requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, SCALE) if own else F.scaled_dot_product_attention(*leaves, scale=SCALE)
    assert out.dtype == dtype
    torch.manual_seed(1)
    (out.float() * torch.randn(out.shape)).sum().backward()
    return [out.detach().float(), *(x.grad.float() for x in leaves if x.grad is not None)]


@pytest.mark.parametrize("n_queries", [37, 1], ids=["all tokens ask", "CLS asks"])
@pytest.mark.parametrize("kept_keys", [512, 8], ids=["weights kept", "weights computed again"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_attention_with_gradients_is_exact_attention_but_for_rounding(
    dtype: torch.dtype, kept_keys: int, n_queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "KEPT_KEYS", kept_keys)
    torch.manual_seed(0)
    # As `split` makes them: views of one tensor, heads not side by side.
    q, k, v = torch.randn(4, 37, 3, 3, 16).permute(2, 0, 3, 1, 4).unbind(0)
    exact = output_and_gradients(q[:, :, :n_queries], k, v, torch.float32, own=False)
    found = output_and_gradients(q[:, :, :n_queries], k, v, dtype, own=True)
    assert len(found) == len(exact) == 4
    for a, b in zip(found, exact, strict=True):
        assert (a - b).norm() < 4 * torch.finfo(dtype).eps * b.norm()


def test_narrow_attention_within_autocast_stays_narrow() -> None:
    q, k, v = (torch.randn(2, 3, 5, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(q, k, v, SCALE).dtype == torch.bfloat16


def test_attention_without_gradients_and_in_float32_is_torchs_own() -> None:
    q, k, v = (torch.randn(2, 3, 5, 16, requires_grad=True) for _ in range(3))
    assert torch.equal(attend(q, k, v, SCALE), F.scaled_dot_product_attention(q, k, v, scale=SCALE))
    narrow = [x.detach().bfloat16() for x in (q, k, v)]
    assert torch.equal(attend(*narrow, SCALE), F.scaled_dot_product_attention(*narrow, scale=SCALE))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40), (37, 30)])
def test_patches_are_the_convolution_that_the_weights_are_of(height: int, width: int) -> None:
    embed = small_vit().patch_embed
    pixels = torch.randn(2, 3, height, width)
    wanted = embed.proj(pixels).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(pixels), wanted)
    weights = torch.randn(wanted.shape)
    slow = torch.autograd.grad((wanted * weights).sum(), list(embed.parameters()))
    fast = torch.autograd.grad((embed(pixels) * weights).sum(), list(embed.parameters()))
    torch.testing.assert_close(fast, slow)
