"""Heads against naive versions of their papers, and their parameters against published figures."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vizattn import Segmenter, VizattnError
from vizattn.heads import HEADS, SimpleFeaturePyramid, build
from vizattn.heads.conv import ConvBnRelu
from vizattn.heads.resize import ratio, upsample

CHANNELS, STRIDES = (6, 10, 12, 16), (4, 8, 16, 32)


def maps(height: int = 64, width: int = 96, batch: int = 2) -> list[Tensor]:
    """Of images of this size, in float64."""
    g = torch.Generator().manual_seed(0)
    sizes = [(-(-height // s), -(-width // s)) for s in STRIDES]
    return [torch.randn(batch, c, *size, generator=g, dtype=torch.float64) for c, size in zip(CHANNELS, sizes)]


def head(name: str, classes: int = 5, **options: object) -> nn.Module:
    """In evaluation mode and float64, with norms that are not at their initial values."""
    torch.manual_seed(0)
    module = build(name, CHANNELS, STRIDES, classes, **options).double().eval()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, std=0.3)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return module


def resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


def test_linear_is_a_convolution_of_the_resized_concatenation() -> None:
    module, x = head("linear"), maps()
    joined = torch.cat([resized(m, x[0]) for m in x], dim=1)
    weight = torch.cat([conv.weight for conv in module.convs], dim=1)
    torch.testing.assert_close(module(x), F.conv2d(joined, weight, module.convs[0].bias))


def test_semantic_fpn_is_that_of_the_paper() -> None:
    """arXiv:1901.02446: lateral sums, an output convolution, then steps of two to the finest grid."""
    module, x = head("semantic_fpn", fpn_dim=8, dim=4), maps()
    levels = [F.conv2d(m, c.weight, c.bias) for m, c in zip(x, module.laterals)]
    for i in (2, 1, 0):
        levels[i] = levels[i] + F.interpolate(levels[i + 1], size=levels[i].shape[-2:], mode="nearest")
    levels = [F.conv2d(m, c.weight, c.bias, padding=1) for m, c in zip(levels, module.outputs)]
    total = torch.zeros(())
    for level, scale, steps in zip(levels, module.scales, (0, 1, 2, 3)):
        blocks = [layer for layer in scale if isinstance(layer, ConvBnRelu)]
        assert len(blocks) == max(steps, 1)
        for block in blocks:
            level = F.relu(F.batch_norm(block.conv(level), *norm_of(block), eps=1e-5))
            if steps:
                level = F.interpolate(level, scale_factor=2, mode="bilinear", align_corners=False)
        total = total + level
    torch.testing.assert_close(module(x), module.classifier(total))


def test_upernet_is_that_of_the_paper() -> None:
    """arXiv:1807.10221: pyramid pooling, a top-down pathway, all levels joined at the finest."""
    module, x = head("upernet", dim=8), maps()
    pooled = [x[-1]]
    for cells, block in zip((1, 2, 3, 6), module.pooling.convs):
        pooled.append(resized(naive_block(block, F.adaptive_avg_pool2d(x[-1], cells)), x[-1]))
    levels = [naive_block(block, m) for m, block in zip(x, module.laterals)]
    levels.append(naive_block(module.pooling.bottleneck, torch.cat(pooled, dim=1)))
    for i in (2, 1, 0):
        levels[i] = levels[i] + resized(levels[i + 1], levels[i])
    levels = [naive_block(block, m) for m, block in zip(levels, module.outputs)] + levels[-1:]
    joined = torch.cat([resized(m, levels[0]) for m in levels], dim=1)
    torch.testing.assert_close(module(x), module.classifier(naive_block(module.bottleneck, joined)))


def test_setr_pup_ends_before_the_last_upsampling_of_the_paper() -> None:
    """arXiv:2012.15840: from stride 16, four times a convolution and upsampling, then the classifier.

    Here the classifier comes before the last upsampling, which is that of whoever resizes the logits.
    """
    torch.manual_seed(0)
    module = build("setr_pup", (12,), (16,), 5, dim=8).double().eval()
    x = torch.randn(2, 12, 3, 4, dtype=torch.float64)
    assert module.stride == 2
    y, blocks = x, [layer for layer in module.layers if isinstance(layer, ConvBnRelu)]
    assert len(blocks) == 4
    for block in blocks:
        y = F.interpolate(naive_block(block, y), scale_factor=2, mode="bilinear", align_corners=False)
    expected = module.classifier(y)
    assert expected.shape == (2, 5, 48, 64)
    torch.testing.assert_close(F.interpolate(module([x]), scale_factor=2, mode="bilinear"), expected)


def test_fcn_reads_the_last_map() -> None:
    module, x = head("fcn", dim=8), maps()
    torch.testing.assert_close(module(x), module.classifier(naive_block(module.conv, x[-1])))
    assert module.stride == 32


def naive_block(block: ConvBnRelu, x: Tensor) -> Tensor:
    weight = block.conv.weight
    x = F.conv2d(x, weight, padding=weight.shape[-1] // 2)
    return F.relu(F.batch_norm(x, *norm_of(block), eps=1e-5))


def norm_of(block: ConvBnRelu) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return block.bn.running_mean, block.bn.running_var, block.bn.weight, block.bn.bias


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("size", [(64, 96), (61, 75), (33, 7)])
def test_logits_lie_on_the_grid_that_the_stride_says(name: str, size: tuple[int, int]) -> None:
    module, x = head(name, **({} if name == "linear" else {"dim": 8})), maps(*size)
    used = [x[i] for i in module.in_indices]
    logits = module(x)
    finest = [-(-side // module.stride) for side in size]
    assert logits.shape[:2] == (2, 5)
    assert all(a >= b for a, b in zip(logits.shape[2:], finest))
    if name != "setr_pup":  # it goes beyond its map
        assert logits.shape[2:] == used[0].shape[2:]


def test_coarse_maps_stay_in_place_at_odd_sizes() -> None:
    """Cutting the image does not move what a coarse position says: no map is squeezed to the image."""
    x = torch.arange(12.0).view(1, 1, 1, 12)
    whole, cut = upsample(x, 8, (4, 96)), upsample(x, 8, (4, 90))
    assert torch.equal(whole[..., :90], cut)
    assert upsample(x, 1, (1, 12)).data_ptr() == x.data_ptr()


@pytest.mark.parametrize(("coarse", "fine"), [(12, 4), (6, 4), (4, 8)])
def test_strides_that_are_no_pyramid(coarse: int, fine: int) -> None:
    with pytest.raises(VizattnError, match="power of two"):
        ratio(coarse, fine)


@pytest.mark.parametrize(
    ("stride", "strides"),
    [(4, [4, 8, 16, 32]), (8, [4, 8, 16, 32]), (16, [4, 8, 16, 32]), (14, [7, 14, 28, 56]), (32, [8, 16, 32, 64])],
)
def test_simple_feature_pyramid(stride: int, strides: list[int]) -> None:
    neck = SimpleFeaturePyramid(24, stride, dim=16)
    assert neck.strides == strides
    x = torch.randn(1, 24, 5, 6)
    for level, s in zip(neck(x), strides):
        assert level.shape == (1, 16, -(-5 * stride // s), -(-6 * stride // s))


def test_simple_feature_pyramid_is_that_of_the_paper() -> None:
    """arXiv:2203.16527, counted: transposed convolutions, here to 1/2 and 1/4 of the width, with LN and GELU between
    them, and on each level a 1x1 and a 3x3 convolution to 256, each with LN."""
    dim = 768
    up = lambda c: c * (c // 2) * 4 + c // 2  # noqa: E731
    level = lambda c: c * 256 + 256 * 256 * 9 + 4 * 256  # noqa: E731
    expected = up(dim) + 2 * (dim // 2) + up(dim // 2) + level(dim // 4)  # stride 4
    expected += up(dim) + level(dim // 2)  # stride 8
    expected += 2 * level(dim)  # strides 16 and 32
    assert sum(p.numel() for p in SimpleFeaturePyramid(dim, 16).parameters()) == expected


@pytest.mark.parametrize("kernel", [1, 3])
def test_one_value_is_normed_by_running_statistics(kernel: int) -> None:
    torch.manual_seed(0)
    block = ConvBnRelu(4, 6, kernel)
    x = torch.randn(1, 4, 1, 1, requires_grad=True)
    block.train()(torch.randn(3, 4, 5, 5))  # moves the statistics
    state = {name: t.clone() for name, t in block.state_dict().items()}
    trained = block(x)
    trained.sum().backward()
    assert all(p.grad is not None for p in block.parameters())
    assert all(torch.equal(t, state[name]) for name, t in block.state_dict().items())
    assert torch.equal(trained, block.eval()(x))


def test_more_values_are_normed_by_their_own_statistics() -> None:
    torch.manual_seed(0)
    block, plain = ConvBnRelu(4, 6, 1).train(), nn.BatchNorm2d(6)
    for shape in ((2, 4, 1, 1), (1, 4, 1, 2)):
        x = torch.randn(shape)
        torch.testing.assert_close(block(x), plain(block.conv(x)).relu())
    torch.testing.assert_close(block.bn.running_var, plain.running_var)


def million(module: nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


#: Backbone -> parameters in millions of backbone and head at 150 classes, from the papers' tables on ADE20K. UPerNet
#: includes its auxiliary FCN head: of Swin-T 27.5 are the backbone, 31.5 the head, 0.9 the auxiliary head.
UPERNET = {
    "swin_tiny_patch4_window7_224": 60,  # arXiv:2103.14030
    "swin_small_patch4_window7_224": 81,
    "swin_base_patch4_window7_224": 121,
    "convnext_tiny": 60,  # arXiv:2201.03545
    "convnext_small": 82,
    "convnext_base": 122,
    "nat_mini": 50,  # arXiv:2204.07143
    "nat_tiny": 58,
    "nat_small": 82,
    "nat_base": 123,
}
SEMANTIC_FPN = {  # arXiv:2102.12122
    "resnet18": 15.5,
    "resnet50": 28.5,
    "resnet101": 47.5,
}


@pytest.mark.parametrize("name", UPERNET)
def test_parameters_of_upernet(name: str) -> None:
    with torch.device("meta"):
        model = Segmenter(timm.create_model(name, features_only=True), 150, head="upernet", auxiliary=True)
    assert million(model) == pytest.approx(UPERNET[name], rel=0.01)


@pytest.mark.parametrize("name", SEMANTIC_FPN)
def test_parameters_of_semantic_fpn(name: str) -> None:
    with torch.device("meta"):
        model = Segmenter(timm.create_model(name, features_only=True, out_indices=(1, 2, 3, 4)), 150)
    assert million(model) == pytest.approx(SEMANTIC_FPN[name], rel=0.01)


def test_parameters_of_the_heads_by_themselves() -> None:
    """The same heads in exact numbers, derived layer by layer: they are the greater part of what is above."""
    channels, classes, d = (96, 192, 384, 768), 150, 512
    block = lambda i, o, k: i * o * k * k + 2 * o  # noqa: E731  (convolution without bias, norm)
    classifier = lambda i: i * classes + classes  # noqa: E731
    upernet = 4 * block(768, d, 1) + block(768 + 4 * d, d, 3)  # pyramid pooling
    upernet += sum(block(c, d, 1) for c in channels[:3]) + 3 * block(d, d, 3) + block(4 * d, d, 3) + classifier(d)
    fpn = sum(c * 256 + 256 for c in channels) + 4 * (256 * 256 * 9 + 256)
    fpn += 4 * block(256, 128, 3) + 3 * block(128, 128, 3) + classifier(128)  # 0 + 0 + 1 + 2 further convolutions
    expected = {
        "upernet": upernet,
        "semantic_fpn": fpn,
        "fcn": block(768, 256, 3) + classifier(256),
        "linear": sum(channels) * classes + classes,
    }
    for name, count in expected.items():
        assert sum(p.numel() for p in build(name, channels, STRIDES, classes).parameters()) == count, name


def test_parameters_of_setr_pup() -> None:
    """13.18 million are trained beside a frozen ViT-L (arXiv:2203.12119, ADE20K, "head").

    These are the head, its LayerNorm, and three auxiliary heads of two 3x3 convolutions to 256, each with a LayerNorm
    and a classifier: 4.17 + 3 * 2.99.
    """
    with torch.device("meta"):
        backbone = timm.create_model("vit_large_patch16_224", features_only=True, out_indices=(23,))
        model = Segmenter(backbone, 150, head="setr_pup")
    auxiliary = (1024 * 256 * 9 + 256 * 256 * 9 + 4 * 256) + (256 * 150 + 150) + 2 * 1024
    assert million(model) - million(backbone) + 3 * auxiliary / 1e6 == pytest.approx(13.18, rel=0.01)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("upper_net", {}, "Did you mean 'upernet'"),
        ("upernet", {"dimm": 3}, r"option of the head 'upernet' 'dimm'. Did you mean 'dim'"),
        ("linear", {"dim": 3}, "'linear' has no options"),
        ("fcn", {"channels": 3}, "Unknown option"),
    ],
)
def test_mistakes(name: str, options: dict, message: str) -> None:
    with pytest.raises(VizattnError, match=message):
        Segmenter(timm.create_model("resnet18", features_only=True), 5, head=name, **options)


def test_no_classes() -> None:
    with pytest.raises(VizattnError, match="num_classes=0"):
        build("linear", CHANNELS, STRIDES, 0)
