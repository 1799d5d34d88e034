"""VPT, HST and efficient probing against the recorded outputs of the released implementations, in float64."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from reference import load, normal_input, relative_error, weight
from torch import Tensor, nn

import vizattn
from vizattn.adapters.efficient_probing import EfficientProbe

TOLERANCE = 1e-8


def image() -> Tensor:
    return normal_input("input:224x224", (2, 3, 224, 224))


def fuse_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Separate query, key and value layers to one qkv layer."""
    out = {}
    for key, value in state.items():
        if ".q." in key and key.replace(".q.", ".k.") in state and key.startswith("blocks."):
            parts = [state[key.replace(".q.", f".{p}.")] for p in "qkv"]
            out[key.replace(".q.", ".qkv.")] = torch.cat(parts)
        elif not re.search(r"blocks\..*attn\.[kv]\.", key):
            out[key] = value
    return out


def vpt_state(rows: list) -> dict[str, Tensor]:
    """Reference keys to the keys of a ViT with deep prompts."""
    names = {
        r"enc\.transformer\.embeddings\.position_embeddings": "pos_embed",
        r"enc\.transformer\.embeddings\.cls_token": "cls_token",
        r"enc\.transformer\.embeddings\.patch_embeddings\.": "patch_embed.proj.",
        r"enc\.transformer\.encoder\.layer\.": "blocks.",
        r"enc\.transformer\.encoder\.encoder_norm\.": "norm.",
        r"\.attention_norm\.": ".norm1.",
        r"\.ffn_norm\.": ".norm2.",
        r"\.ffn\.": ".mlp.",
        r"\.attn\.query\.": ".attn.q.",
        r"\.attn\.key\.": ".attn.k.",
        r"\.attn\.value\.": ".attn.v.",
        r"\.attn\.out\.": ".attn.proj.",
        r"head\.last_layer\.": "head.",
    }
    state = {}
    for _, key, shape, _ in rows:
        value = weight(key, shape)
        if key.endswith("deep_prompt_embeddings"):
            state.update({f"adapters.vpt.prompts.{i + 1}": p for i, p in enumerate(value)})
        elif key.endswith("prompt_embeddings"):
            state["adapters.vpt.prompts.0"] = value[0]
        else:
            for pattern, name in names.items():
                key = re.sub(pattern, name, key)
            state[key] = value
    return fuse_qkv(state)


def test_vpt_deep():
    case = load("vpt_deep_vitb16_p5")
    model = timm.create_model("vit_base_patch16_224", num_classes=10).eval()
    vizattn.attach(model, "vpt", num_tokens=5)
    model.double().load_state_dict(vpt_state(case["keys_backbone"] + case["keys_prompt_and_head"]))
    logits = model(image())
    loss = logits.pow(2).mean()
    loss.backward()
    assert relative_error(logits, case["logits_float64"]) < TOLERANCE
    assert relative_error(loss, case["loss_float64"]) < TOLERANCE
    prompts = [p.grad for p in model.adapters["vpt"].prompts]
    norms = case["grad_l2_float64"]
    assert relative_error(prompts[0].norm(), norms["enc.transformer.prompt_embeddings"]) < TOLERANCE
    by_layer = torch.stack([p.norm() for p in prompts[1:]])
    assert relative_error(by_layer, case["deep_prompt_grad_l2_by_layer_float64"]) < TOLERANCE
    first = case["grad_first8_float64"]
    assert relative_error(prompts[0].flatten()[:8], first["enc.transformer.prompt_embeddings"]) < TOLERANCE
    assert relative_error(prompts[1].flatten()[:8], first["enc.transformer.deep_prompt_embeddings"]) < TOLERANCE
    assert relative_error(model.head.weight.grad.norm(), norms["head.last_layer.weight"]) < TOLERANCE
    assert relative_error(model.head.bias.grad.norm(), norms["head.last_layer.bias"]) < TOLERANCE


def hst_name(key: str) -> str:
    """Reference key to ours."""
    side = "adapters.hst."
    rules = [
        (r"m_patch_embed1\.conv\.(\d)\.", rf"{side}stages.0.down.\1."),
        (r"m_patch_embed(\d)\.proj\.", lambda m: f"{side}stages.{int(m[1]) - 1}.down."),
        (r"m_patch_embed(\d)\.norm\.", lambda m: f"{side}stages.{int(m[1]) - 1}.down_norm."),
        (r"m_block(\d)\.", lambda m: f"{side}stages.{int(m[1]) - 1}.blocks."),
        (r"m_norm(\d)\.", lambda m: f"{side}stages.{int(m[1]) - 1}.norm."),
        (r"T_Bridge_(\d)\.", lambda m: f"{side}stages.{int(m[1]) - 1}.bridge."),
        (
            r"m_proj_norm(\d+)\.",
            lambda m: f"{side}stages.{(int(m[1]) - 1) // 3}.meta_norms.{(int(m[1]) - 1) % 3}.",
        ),
        (r"m_embeddings\.", f"{side}meta_tokens."),
        (r"fc_norm\.", f"{side}norm."),
    ]
    for pattern, name in rules:
        key, count = re.subn("^" + pattern, name, key)
        if count:
            break
    return key


def test_hst():
    case = load("hst_vit_base_patch16_224")
    model = timm.create_model("vit_base_patch16_224", num_classes=10).eval()
    vizattn.attach(model, "hst")
    rows = case["keys_backbone"] + case["keys_side"]
    model.double().load_state_dict({hst_name(key): weight(key, shape) for _, key, shape, _ in rows})
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {hst_name(key) for _, key, _, role in rows if role == "trainable"}

    norms = {}
    watched = {
        "m_proj_norm1": "adapters.hst.stages.0.meta_norms.0",
        "m_block1.2": "adapters.hst.stages.0.blocks.2",
        "m_block4.0": "adapters.hst.stages.3.blocks.0",
        "fc_norm": "adapters.hst.norm",
    }
    for theirs, ours in watched.items():
        model.get_submodule(ours).register_forward_hook(
            lambda _m, _i, out, name=theirs: norms.update({name: out.flatten(1).norm(dim=1)})
        )
    logits = model(image())
    loss = logits.pow(2).mean()
    loss.backward()
    assert relative_error(logits, case["logits_float64"]) < TOLERANCE
    assert relative_error(loss, case["loss_float64"]) < TOLERANCE
    recorded = {row["module"]: row["l2_float64"] for row in case["feature_l2"]}
    for name, value in norms.items():
        assert relative_error(value, recorded[name]) < TOLERANCE, name
    for key, expected in case["grad_l2_float64"].items():
        assert relative_error(model.get_parameter(hst_name(key)).grad.norm(), expected) < TOLERANCE, key
    for key, expected in case["grad_first8_float64"].items():
        assert relative_error(model.get_parameter(hst_name(key)).grad.flatten()[:8], expected) < TOLERANCE, key
    for key in case["trainable_with_vanishing_gradient"]:
        assert model.get_parameter(hst_name(key)).grad.abs().max() < 1e-12, key


def test_hst_norm_eps():
    """A wrong eps hides below float32 tolerances, so it is compared directly."""
    model = vizattn.attach(timm.create_model("vit_tiny_patch16_224", num_classes=10), "hst")
    side = model.adapters["hst"]
    eps = {
        name: m.eps
        for name, m in side.named_modules()
        if isinstance(m, (nn.LayerNorm, nn.modules.batchnorm._BatchNorm))
    }
    for name, value in eps.items():
        large = "down_norm" in name or "meta_norms" in name or name == "stages.0.down.1"
        assert value == (1e-5 if large else 1e-6), name
    assert len(eps) == 4 + 12 + 24 + 4 + 1 + 1


@pytest.mark.parametrize("dim_queries", [(192, 4), (768, 32)])
@pytest.mark.parametrize("sharp", [False, True])
def test_efficient_probing(dim_queries, sharp):
    dim, queries = dim_queries
    case = load(f"ep_d{dim}_q{queries}_o1_n196")
    probe = EfficientProbe(dim, queries).double()
    filled = weight("cls_token", [1, queries, dim])[0]
    if sharp:
        case = case["sharp_queries"]
        filled = (filled * case["query_gain"]).float().double()
    probe.load_state_dict({"queries": filled, "v.weight": weight("v.weight", [dim, dim])})
    tokens = normal_input(f"tokens:2x196x{dim}", (2, 196, dim))
    maps = probe.attention(tokens)
    out = probe(tokens)
    out.pow(2).mean().backward()
    assert relative_error(maps.flatten(1)[:, :8], case["attention_first8_float64"]) < TOLERANCE
    assert relative_error(maps.flatten(1).norm(dim=1), case["attention_l2_float64"]) < TOLERANCE
    assert relative_error(maps.flatten(1).amax(dim=1), case["attention_max_float64"]) < TOLERANCE
    assert relative_error(out[:, :16], case["output_first16_float64"]) < TOLERANCE
    assert relative_error(out.sum(1), case["output_sum_float64"]) < TOLERANCE
    assert relative_error(out.norm(dim=1), case["output_l2_float64"]) < TOLERANCE
    grads = {"cls_token": probe.queries.grad, "v.weight": probe.v.weight.grad}
    for key, grad in grads.items():
        assert relative_error(grad.norm(), case["grad_l2_float64"][key]) < TOLERANCE, key
        assert relative_error(grad.flatten()[:8], case["grad_first8_float64"][key]) < 1e-7, (
            key
        )  # 12 digits of tiny values


@pytest.mark.parametrize("dim_queries", [(192, 4), (768, 32)])
def test_efficient_probing_head(dim_queries):
    """The whole head, through a model: tokens in, logits out."""
    dim, queries = dim_queries
    case = load(f"ep_d{dim}_q{queries}_o1_n196")["head"]
    model = timm.create_model(
        "vit_base_patch16_224", embed_dim=dim, depth=1, num_heads=4, num_classes=10, img_size=224
    ).eval()
    vizattn.attach(model, "efficient_probing", num_queries=queries)
    names = {
        "0.cls_token": "adapters.efficient_probing.probe.queries",
        "0.v.weight": "adapters.efficient_probing.probe.v.weight",
        "1.running_mean": "adapters.efficient_probing.norm.running_mean",
        "1.running_var": "adapters.efficient_probing.norm.running_var",
        "1.num_batches_tracked": "adapters.efficient_probing.norm.num_batches_tracked",
        "2.weight": "head.weight",
        "2.bias": "head.bias",
    }
    state = {names[key]: weight(key, shape) for _, key, shape, _ in case["keys"]}
    state["adapters.efficient_probing.probe.queries"] = state["adapters.efficient_probing.probe.queries"][0]
    missing = model.double().load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and not any(k in names.values() for k in missing.missing_keys)
    tokens = normal_input(f"tokens:2x196x{dim}", (2, 196, dim))
    logits = model.forward_head(torch.cat([torch.full((2, 1, dim), 9.0, dtype=torch.float64), tokens], dim=1))
    assert relative_error(logits, case["logits_float64"]) < TOLERANCE
