"""CLIP's towers: a small one for small images, and exact shortcuts through open_clip's transformers.

B images or texts, T tokens, W width of a tower, D embedding width.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from open_clip.transformer import ResidualAttentionBlock, TextTransformer, VisionTransformer
from timm.models import register_model
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class FlatConvNet(nn.Module):
    """A small image tower for small images: stride-2 convolutions, flattened without pooling to keep position.

    Args:
        image_size: side of the square input, a multiple of 16.
        widths: channels of the stem and of the three stages.
    """

    def __init__(self, image_size: int = 64, widths: Sequence[int] = (24, 48, 96, 144)) -> None:
        super().__init__()
        layers: list[nn.Module] = [*_conv_norm_relu(3, widths[0], stride=2)]
        for width_in, width_out in itertools.pairwise(widths):
            layers += [*_conv_norm_relu(width_in, width_out, stride=2), *_conv_norm_relu(width_out, width_out)]
        self.layers = nn.Sequential(*layers)
        self.num_features = widths[-1] * (image_size // 16) ** 2
        self.default_cfg: dict[str, Any] = {}

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, num_features]."""
        return torch.flatten(self.layers(images), 1)

    def reset_classifier(self, num_classes: int) -> None:
        """open_clip's call to remove a classifier; there is none."""


def _conv_norm_relu(width_in: int, width_out: int, stride: int = 1) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
    return convolution, nn.BatchNorm2d(width_out), nn.ReLU(inplace=True)


@register_model
def flat_convnet_64(
    pretrained: bool = False,
    pretrained_cfg: object = None,
    pretrained_cfg_overlay: object = None,
    cache_dir: object = None,
) -> FlatConvNet:
    """`FlatConvNet` for 64 px images, as a `timm_model_name` of open_clip's configs.

    timm passes the arguments; they have no effect.
    """
    return FlatConvNet()


# --------------------------------------------------------------------------------------------------------- shortcuts


def fold_norms(tower: nn.Module) -> None:
    """Fold batch norms into the convolutions they follow in a sequence; exact in evaluation mode."""
    for layers in tower.modules():
        if isinstance(layers, nn.Sequential):
            for (name, convolution), (after, norm) in itertools.pairwise(list(layers.named_children())):
                if type(convolution) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
                    setattr(layers, name, fuse_conv_bn_eval(convolution, norm))
                    setattr(layers, after, nn.Identity())


def image_features(tower: Any, images: Tensor) -> Tensor:
    """[B, 3, S, S] normalised -> [B, D], equal to the tower's own output.

    Without gradients, a vision transformer's last block is computed for the class token only.
    """
    plain = type(tower) is VisionTransformer and tower.pool_type == "tok" and tower.attn_pool is None
    if not plain or tower.proj is None or tower.output_tokens or not _plain_blocks(tower):
        features: Tensor = tower(images)
        return features
    hidden_BTW = tower._embeds(images)
    *blocks, last = tower.transformer.resblocks
    for block in blocks:
        hidden_BTW = block(hidden_BTW)
    first_B = hidden_BTW.new_zeros(len(hidden_BTW), dtype=torch.long)
    token_BW = last(hidden_BTW)[:, 0] if torch.is_grad_enabled() else _one_token(last, hidden_BTW, first_B)
    pooled: Tensor = tower.ln_post(token_BW) @ tower.proj
    return pooled


def text_features(tower: Any, tokens: Tensor) -> Tensor:
    """[B, T] -> [B, D], equal to the tower's own output.

    In CLIP's own towers attention is causal and only the end token is read, so T may be that of `trim_tokens`, and
    without gradients the last block is computed for the end tokens only.
    """
    if not _reads_end_token(tower) or not len(tokens):
        features: Tensor = tower(tokens)
        return features
    end_B, length = tokens.argmax(1), tokens.shape[1]
    hidden_BTW = tower.token_embedding(tokens) + tower.positional_embedding[:length]
    *blocks, last = tower.transformer.resblocks
    mask_TT = tower.attn_mask[:length, :length]
    for block in blocks:
        hidden_BTW = block(hidden_BTW, attn_mask=mask_TT)
    if torch.is_grad_enabled():
        token_BW = last(hidden_BTW, attn_mask=mask_TT)[torch.arange(len(tokens), device=tokens.device), end_B]
    else:
        token_BW = _one_token(last, hidden_BTW, end_B, torch.arange(length, device=tokens.device) > end_B[:, None])
    pooled: Tensor = tower.ln_final(token_BW) @ tower.text_projection
    return pooled


def trim_tokens(tower: Any, tokens: Tensor) -> Tensor:
    """[B, T] tokens without those after the longest sentence, for a tower that does not read them.

    Called before tokens are moved to an accelerator, which would have to be waited for.
    """
    if not _reads_end_token(tower) or not len(tokens):
        return tokens
    return tokens[:, : int(tokens.argmax(1).max()) + 1]  # the end token has the highest id; padding that of "!"


def _reads_end_token(tower: Any) -> bool:
    """Whether attention is causal and the features are those of the end token."""
    causal = type(tower) is TextTransformer and tower.pool_type == "argmax" and tower.cls_emb is None
    plain = causal and tower.attn_mask is not None and isinstance(tower.text_projection, nn.Parameter)
    return plain and not tower.output_tokens and _plain_blocks(tower)


def _plain_blocks(tower: Any) -> bool:
    blocks = tower.transformer.resblocks
    return len(blocks) > 0 and tower.transformer.batch_first and all(type(b) is ResidualAttentionBlock for b in blocks)


def _one_token(block: Any, hidden_BTW: Tensor, place_B: Tensor, hidden_from_it_BT: Tensor | None = None) -> Tensor:
    """[B, W] output of a block for one token of each row, which attends to all tokens not hidden from it."""
    row_B = torch.arange(len(hidden_BTW), device=hidden_BTW.device)
    normed_BTW = block.ln_1(hidden_BTW)
    query_B1W = normed_BTW[row_B, place_B][:, None]
    attended_B1W = block.attn(
        query_B1W, normed_BTW, normed_BTW, need_weights=False, key_padding_mask=hidden_from_it_BT
    )[0]
    own_BW = hidden_BTW[row_B, place_B] + block.ls_1(attended_B1W[:, 0])
    output: Tensor = own_BW + block.ls_2(block.mlp(block.ln_2(own_BW)))
    return output
