"""A backbone with its heads as one network: what is served and what is exported."""

from torch import Tensor, nn

from backbones.heads import DepthHead
from backbones.resnet import ResNet
from backbones.vit import ViT
from data.errors import InputError


class Network(nn.Module):
    """Normalised pixels [B, 3, H, W] to every output that the backbone and its heads have."""

    def __init__(self, backbone: ViT | ResNet, depth_head: DepthHead | None = None) -> None:
        super().__init__()
        if depth_head is not None and depth_head.spec.width_in != 2 * backbone.embed_dim:
            raise InputError(
                f"the depth head takes {depth_head.spec.width_in} features, this backbone gives {2 * backbone.embed_dim} "
                "(patch and CLS); train a head on this backbone"
            )
        self.backbone = backbone
        self.depth_head = depth_head

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in the order in which `forward` gives them."""
        attention = ("attention",) if isinstance(self.backbone, ViT) else ()
        depth = ("depth",) if self.depth_head is not None else ()
        return ("embedding", "patches", *attention, *depth)

    def forward(self, pixels_BCHW: Tensor) -> dict[str, Tensor]:
        """`embedding` [B, D], `patches` [B, N, D], `attention` [B, heads, h, w] (ViT), `depth` [B, H, W] (with its head)."""
        outputs = self.backbone.outputs(pixels_BCHW)
        if self.depth_head is not None:
            H, W = pixels_BCHW.shape[2:]
            grid = (H // self.backbone.patch_px, W // self.backbone.patch_px)
            outputs["depth"] = self.depth_head(outputs["patches"], outputs["embedding"], grid, (H, W))
        return outputs
