"""The ViT's contract where timm's own test-suite (see tools/timm_suite.py) does not look."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import set_fused_attn
from timm.models import get_notrace_functions, get_notrace_modules
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor

from vizattn import VizattnError
from vizattn.models.vit import VisionTransformer

NANO = "vit_va_nano_patch4_32"
SIZES = [(32, 32), (30, 45), (33, 33), (64, 48), (3, 5)]


@pytest.fixture
def nano() -> VisionTransformer:
    return timm.create_model(NANO, depth=3).eval()


def images(height: int, width: int, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def test_nano_is_what_it_says() -> None:
    model = timm.create_model(NANO)
    assert (model.num_classes, model.embed_dim, len(model.blocks), model.blocks[0].attn.num_heads) == (52, 96, 6, 3)
    assert model.patch_embed.grid_size == (8, 8)
    assert model.pos_embed.shape == (1, 65, 96)


@pytest.mark.parametrize("size", SIZES)
def test_any_size(nano: VisionTransformer, size: tuple[int, int]) -> None:
    height, width = size
    H, W = -(-height // 4), -(-width // 4)
    x = images(height, width)
    assert nano(x).shape == (2, 52)
    assert nano.forward_features(x).shape == (2, 1 + H * W, 96)
    final, maps = nano.forward_intermediates(x)
    torch.testing.assert_close(final, nano.forward_features(x))
    assert [tuple(m.shape) for m in maps] == [(2, 96, H, W)] * 3


def test_partial_patches_see_zeros_below_and_right(nano: VisionTransformer) -> None:
    x = images(30, 45)
    assert torch.equal(nano.forward_features(x), nano.forward_features(F.pad(x, (0, 3, 0, 2))))


@pytest.mark.parametrize("size", SIZES)
def test_samples_are_independent(nano: VisionTransformer, size: tuple[int, int]) -> None:
    x = images(*size, batch=3)
    torch.testing.assert_close(nano(x)[1:2], nano(x[1:2]), rtol=1e-4, atol=1e-5)


def test_position_table_follows_the_input(nano: VisionTransformer) -> None:
    """A permanent resize gives what the resize on the fly gave, and the native size uses the table as it is."""
    x = images(64, 48)
    on_the_fly = nano(x)
    table = nano.pos_embed.detach().clone()
    nano.set_input_size((64, 48))
    assert nano.pos_embed.shape == (1, 1 + 16 * 12, 96)
    assert torch.equal(nano.pos_embed[:, :1], table[:, :1])
    torch.testing.assert_close(nano(x), on_the_fly)
    assert timm.models.get_model_input_config(nano)["input_size"] == (3, 64, 48)
    assert not nano.patch_embed.strict_img_size

    tokens = nano.patch_embed(x)
    expected = torch.cat([nano.cls_token.expand(2, -1, -1), tokens.flatten(1, 2)], dim=1) + nano.pos_embed
    assert torch.equal(nano._pos_embed(tokens), expected)


def test_position_table_of_the_same_length_but_another_shape(nano: VisionTransformer) -> None:
    table = nano.pos_embed.detach().clone()
    nano.set_input_size((16, 64))
    assert nano.pos_embed.shape == table.shape
    assert not torch.allclose(nano.pos_embed, table, atol=1e-3)


def test_set_patch_size(nano: VisionTransformer) -> None:
    nano.requires_grad_(False)
    nano.set_input_size(patch_size=8)
    assert nano.patch_embed.proj.weight.shape[-2:] == (8, 8)
    assert nano.pos_embed.shape == (1, 17, 96)
    assert not any(parameter.requires_grad for parameter in nano.parameters())
    assert nano(images(32, 32)).shape == (2, 52)


def test_positions_receive_gradients_at_other_sizes(nano: VisionTransformer) -> None:
    nano(images(30, 45)).sum().backward()
    assert nano.pos_embed.grad is not None
    assert (nano.pos_embed.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("size", [(32, 32), (30, 45)])
def test_fused_and_explicit_attention_agree(size: tuple[int, int]) -> None:
    fused = timm.create_model(NANO, depth=2, qk_norm=True).eval()
    set_fused_attn(False)
    try:
        explicit = timm.create_model(NANO, depth=2, qk_norm=True).eval()
    finally:
        set_fused_attn(True)
    explicit.load_state_dict(fused.state_dict())
    torch.testing.assert_close(explicit(images(*size)), fused(images(*size)))


def test_features_only() -> None:
    model = timm.create_model(NANO, features_only=True, out_indices=(1, -1)).eval()
    assert model.feature_info.channels() == [96, 96]
    assert model.feature_info.reduction() == [4, 4]
    maps = model(images(30, 45))
    assert [tuple(m.shape) for m in maps] == [(2, 96, 8, 12)] * 2
    assert len(timm.create_model(NANO, features_only=True)(images(32, 32))) == 3


def test_intermediates_options(nano: VisionTransformer) -> None:
    x = images(33, 20)
    final, maps = nano.forward_intermediates(x)
    pairs = nano.forward_intermediates(x, return_prefix_tokens=True, intermediates_only=True)
    for (tokens, prefix), expected in zip(pairs, maps):
        assert torch.equal(tokens, expected)
        assert prefix.shape == (2, 1, 96)
    normed = nano.forward_intermediates(x, indices=[-1], norm=True, output_fmt="NLC", intermediates_only=True)
    assert torch.equal(normed[0], final[:, 1:])
    assert set(nano.forward_intermediates(x, output_dict=True)) == {"image_features", "image_intermediates"}
    runs: list[int] = []
    nano.blocks[2].register_forward_hook(lambda *_: runs.append(2))
    nano.forward_intermediates(x, indices=[1], stop_early=True)
    assert not runs
    with pytest.raises(VizattnError, match="output_fmt must be 'NCHW' or 'NLC', not 'NHWC'"):
        nano.forward_intermediates(x, output_fmt="NHWC")


def test_pruning_keeps_the_features_and_leaves_nothing_unused(nano: VisionTransformer) -> None:
    x = images(32, 32)
    taps = nano.forward_intermediates(x, intermediates_only=True)
    whole = copy.deepcopy(nano)
    assert whole.prune_intermediate_layers([-1], prune_head=False) == [2]
    assert torch.equal(whole(x), nano(x))
    for i, tap in enumerate(taps):
        pruned = copy.deepcopy(nano)
        take = pruned.prune_intermediate_layers([i])
        assert len(pruned.blocks) == i + 1
        torch.testing.assert_close(pruned.forward_intermediates(x, indices=take, intermediates_only=True)[0], tap)
        pruned.train().forward_features(x).sum().backward()
        assert not [name for name, parameter in pruned.named_parameters() if parameter.grad is None]
        pruned.prune_intermediate_layers([i], prune_norm=True)
        assert torch.equal(pruned.forward_features(x)[:, 1:], tap.flatten(2).mT)


@pytest.mark.parametrize("pool", ["", "avg", "avgmax", "max", "token"])
def test_pooling(pool: str) -> None:
    model = timm.create_model(NANO, depth=1, global_pool=pool, num_classes=0).eval()
    tokens = model.forward_features(images(32, 32))
    patches = tokens[:, 1:]
    expected = {
        "": tokens,
        "token": tokens[:, 0],
        "avg": patches.mean(1),
        "max": patches.amax(1),
        "avgmax": (patches.amax(1) + patches.mean(1)) / 2,
    }[pool]
    torch.testing.assert_close(model(images(32, 32)), model.fc_norm(expected))
    torch.testing.assert_close(model.pool(tokens), expected)
    assert isinstance(model.norm, nn.Identity) == (pool in ("avg", "avgmax", "max"))


def test_reset_classifier_keeps_type_mode_and_pooling() -> None:
    model = timm.create_model(NANO, depth=1, global_pool="avg", dtype=torch.float64).eval()
    x = images(32, 32).double()
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    model.reset_classifier(7)
    assert model.get_classifier() is model.head
    assert (model.head.weight.dtype, model.head.training, model.num_classes) == (torch.float64, False, 7)
    assert model(x).shape == (2, 7)
    model.reset_classifier(0, "token")
    torch.testing.assert_close(model(x), model.fc_norm(model.forward_features(x)[:, 0]))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"global_pool": "map"}, "global_pool must be one of '', 'avg', 'avgmax', 'max', 'token', not 'map'"),
        ({"class_token": False}, "needs the class token"),
        ({"attn": "sofmax"}, "Unknown attention 'sofmax'"),
    ],
)
def test_mistakes_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(VizattnError, match=message):
        timm.create_model(NANO, **kwargs)


def test_reset_to_a_pooling_that_does_not_fit() -> None:
    model = timm.create_model(NANO, depth=1, class_token=False, global_pool="avg")
    with pytest.raises(VizattnError, match="needs the class token"):
        model.reset_classifier(5, "token")
    assert (model.global_pool, model.num_classes) == ("avg", 52)


@pytest.mark.parametrize("call", ["forward", "forward_intermediates"])
def test_grad_checkpointing_gives_the_same_gradients(call: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(NANO, depth=3, proj_drop_rate=0.2, drop_path_rate=0.2).train()
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(1)
        output = model(images(30, 45)) if call == "forward" else model.forward_intermediates(images(30, 45))[0]
        output.pow(2).mean().backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    torch.testing.assert_close(grads[1], grads[0])


def test_scripted_and_traced_models_take_other_sizes(nano: VisionTransformer) -> None:
    scripted = torch.jit.script(nano)
    traced = create_feature_extractor(
        nano,
        ["head"],
        tracer_kwargs={"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()},
    )
    for size in [(32, 32), (30, 45)]:
        expected = nano(images(*size))
        torch.testing.assert_close(scripted(images(*size)), expected)
        torch.testing.assert_close(traced(images(*size))["head"], expected)


def test_compiles_in_one_piece(nano: VisionTransformer) -> None:
    compiled = torch.compile(nano, backend="eager", fullgraph=True)
    for size in [(32, 32), (30, 45)]:
        torch.testing.assert_close(compiled(images(*size)), nano(images(*size)))


def test_trains_under_bfloat16_autocast(nano: VisionTransformer) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = nano.train()(images(30, 45))
    assert logits.dtype == torch.bfloat16
    logits.float().logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in nano.parameters())


def test_factory_arguments() -> None:
    model = timm.create_model(NANO, depth=2, device="meta", dtype=torch.bfloat16, reg_tokens=2, init_values=1e-5)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    output = model(torch.empty(2, 3, 30, 45, device="meta", dtype=torch.bfloat16))
    assert (output.shape, output.dtype) == ((2, 52), torch.bfloat16)


def test_bfloat16_is_close_to_float32(nano: VisionTransformer) -> None:
    x = images(30, 45)
    expected = nano(x)
    assert (nano.bfloat16()(x.bfloat16()).float() - expected).norm() < 0.05 * expected.norm()


def test_init_weights_fills_an_empty_model() -> None:
    """A model made on meta and moved by to_empty is as good as a new one."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"depth": 2, "init_values": 0.1, "reg_tokens": 1, "qk_norm": True}
    model = timm.create_model(NANO, device="meta", **options).to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    model.init_weights()
    fresh = timm.create_model(NANO, **options)
    for (name, parameter), reference in zip(model.named_parameters(), fresh.parameters()):
        assert torch.isfinite(parameter).all(), name
        torch.testing.assert_close(parameter.std(correction=0), reference.std(correction=0), rtol=0.2, atol=1e-6)


def test_layer_decay_groups_follow_the_depth(nano: VisionTransformer) -> None:
    groups = timm.models.group_parameters(nano, nano.group_matcher(), reverse=False)
    order = {name: layer for layer, names in groups.items() for name in names}
    layers = [order[name] for name in ("cls_token", "blocks.0.norm1.bias", "blocks.2.norm1.bias", "head.weight")]
    assert layers == sorted(set(layers))
    assert order["pos_embed"] == order["patch_embed.proj.weight"] == order["cls_token"]
    assert order["norm.weight"] == order["blocks.2.norm1.bias"]
    assert set(order) == {name for name, _ in nano.named_parameters()}


def test_patch_dropout_in_training_only() -> None:
    model = timm.create_model(NANO, depth=1, patch_drop_rate=0.5)
    assert model.train().forward_features(images(32, 32)).shape == (2, 33, 96)
    assert model.eval().forward_features(images(32, 32)).shape == (2, 65, 96)


def test_attentions_by_block_and_their_options() -> None:
    model = timm.create_model(
        NANO, depth=3, attn=["agent", "softmax", "window"], attn_kwargs={"agent": {"num_agents": 4}}
    ).eval()
    assert [type(block.attn).__name__ for block in model.blocks] == [
        "AgentAttention",
        "SoftmaxAttention",
        "WindowAttention",
    ]
    assert model.blocks[0].attn.pool_size == 2
    assert model(images(30, 45)).shape == (2, 52)
    with pytest.raises(VizattnError, match="attn names 2 attentions for 3 blocks: agent, softmax"):
        timm.create_model(NANO, depth=3, attn=["agent", "softmax"])
    with pytest.raises(VizattnError, match="Unknown attention of this model in attn_kwargs: 'agnt'"):
        timm.create_model(NANO, depth=1, attn="agent", attn_kwargs={"agnt": {}})
    with pytest.raises(VizattnError, match="patch_drop_rate needs attn='softmax'"):
        timm.create_model(NANO, depth=1, attn="agent", patch_drop_rate=0.5)
