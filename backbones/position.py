"""Position encodings on any grid: bicubic resampling as two small matrix products.

Bicubic interpolation is separable, and its weights are arithmetic on the size of the grid, so a table of M x M encodings becomes
h x w by `A_h @ table @ A_w.T`. One code path covers every published mode and exports to ONNX with dynamic height and width.

Modes (they differ in where output cell i reads the table):
- `offset` 0.1 (DINOv1, DINOv2 without registers): by the scale factor (g + 0.1) / M, so i reads (i + 0.5) * M / (g + 0.1) - 0.5;
- `offset` 0 (DINOv2 with registers): by the size, i reads (i + 0.5) * M / g - 0.5;
- `antialias`: the kernel has a = -0.5 instead of -0.75 and widens when the table is shrunk; its weights are renormalised at the border.
"""

import torch
from torch import Tensor


def cubic_kernel(x: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution kernel (Keys 1981, eq. 15 with free parameter `a`), elementwise; zero where |x| >= 2."""
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def resample_matrix(n_out: int, n_in: int, offset: float, antialias: bool, device: torch.device) -> Tensor:
    """Weights [n_out, n_in] that resample one axis of the table; rows sum to 1."""
    centre_G = (torch.arange(n_out, device=device, dtype=torch.float32) + 0.5) * (n_in / (n_out + offset))
    if antialias:
        table_M = torch.arange(n_in, device=device, dtype=torch.float32) + 0.5
        widening = torch.clamp(torch.ones_like(centre_G) * (n_in / (n_out + offset)), min=1.0)
        weights_GM = cubic_kernel((table_M[None, :] - centre_G[:, None]) / widening[:, None], a=-0.5)
        return weights_GM / weights_GM.sum(dim=1, keepdim=True)
    # Two cells beyond each border are read as the border itself.
    table_M4 = torch.arange(-2, n_in + 2, device=device, dtype=torch.float32) + 0.5
    weights_GM4 = cubic_kernel(table_M4[None, :] - centre_G[:, None], a=-0.75)
    first = weights_GM4[:, :3].sum(dim=1, keepdim=True)
    last = weights_GM4[:, -3:].sum(dim=1, keepdim=True)
    if n_in == 1:
        return weights_GM4.sum(dim=1, keepdim=True)
    return torch.cat([first, weights_GM4[:, 3:-3], last], dim=1)


def resample_table(table_MMD: Tensor, h: int, w: int, *, square: bool, offset: float, antialias: bool) -> Tensor:
    """Encodings [h * w, D] of an h x w grid from a table [M, M, D], in the table's dtype; computed in float32.

    The table's own grid (h = w = M) of a `square` image comes back unchanged, as in the published models: with an offset, resampling it
    would not be the identity. The choice is made by `torch.where`, so that an exported graph with dynamic sizes makes it too.
    """
    side, device = table_MMD.shape[0], table_MMD.device
    rows_hM = resample_matrix(h, side, offset, antialias, device)
    columns_wM = resample_matrix(w, side, offset, antialias, device)
    cells_h, cells_w, cells_M = (torch.arange(n, device=device) for n in (h, w, side))
    native = square & (cells_h[-1] == side - 1) & (cells_w[-1] == side - 1)
    rows_hM = torch.where(native, (cells_h[:, None] == cells_M[None, :]).float(), rows_hM)
    columns_wM = torch.where(native, (cells_w[:, None] == cells_M[None, :]).float(), columns_wM)
    by_row_hMD = torch.einsum("hm,mnd->hnd", rows_hM, table_MMD.float())
    grid_hwD = torch.einsum("wn,hnd->hwd", columns_wM, by_row_hMD)
    return grid_hwD.reshape(h * w, -1).to(table_MMD.dtype)
