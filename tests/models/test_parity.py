"""Every backbone against the recorded outputs of its released implementation, weights converted and loaded strictly."""

from __future__ import annotations

import sys

import pytest
import timm
import torch
from reference import load, normal_input, relative_error, weights

import vizattn  # noqa: F401  (registers the backbones)

EFFICIENTVIT = {"patch_embed": "stem", "blocks1": "stages.0", "blocks2": "stages.1", "blocks3": "stages.2"}
NAT = {
    "levels.0.blocks.2": "stages.0",
    "levels.1.blocks.3": "stages.1",
    "levels.2.blocks.5": "stages.2",
    "levels.3.blocks.4": "stages.3",
}

#: recorded case, our name, where its modules sit in ours if they are called differently
CASES: dict[str, tuple[str, dict[str, str]]] = {
    "agent_deit_tiny": ("deit_agent_tiny", {}),
    "agent_pvt_tiny": (
        "agent_pvt_tiny",
        {f"patch_embed{i + 1}": f"stages.{i}.patch_embed" for i in range(4)}
        | {f"block{i + 1}.1": f"stages.{i}.blocks.1" for i in range(4)},
    ),
    "agent_swin_tiny": (
        "agent_swin_tiny",
        {f"layers.{i}.blocks.{j}": f"stages.{i}.blocks.{j}" for i, j in ((0, 1), (1, 1), (2, 5), (3, 1))},
    ),
    "biformer_tiny": ("biformer_tiny", {"downsample_layers.0": "stem"}),
    "dinat_mini": ("dinat_mini", NAT),
    "efficientvit_m0": ("efficientvit_va_m0", EFFICIENTVIT),
    "efficientvit_m4": ("efficientvit_va_m4", EFFICIENTVIT),
    "l2vit_tiny": ("l2vit_tiny", {"downsample_layers.0": "stem"}),
    "nat_mini": ("nat_mini", NAT),
    "timm_efficientvit_m0": ("efficientvit_va_m0", {"patch_embed": "stem"}),
    "timm_vit_tiny_patch16_224": ("vit_va_tiny_patch16_224", {}),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-5)], ids=["f64", "f32"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name: str, dtype: torch.dtype, tolerance: float) -> None:
    case, (ours, modules) = load(name), CASES[name]
    model = timm.create_model(ours).eval()
    convert = sys.modules[timm.model_entrypoint(ours).__module__].checkpoint_filter_fn
    state = {key: value.float() if value.is_floating_point() else value for key, value in weights(case).items()}
    model.load_state_dict(convert(state, model), strict=True)
    assert sum(p.numel() for p in model.parameters()) == case["params"]
    model.to(dtype)

    x = normal_input("input:224x224", (2, 3, 224, 224)).to(dtype).requires_grad_()
    norms = {}
    for row in case["feature_l2"]:
        module = modules.get(row["module"], row["module"])
        if module:
            model.get_submodule(module).register_forward_hook(
                lambda _module, _inputs, output, name=row["module"]: norms.update(
                    {name: output.detach().flatten(1).double().norm(dim=1)}
                )
            )
    logits = model(x)
    logits.pow(2).mean().backward()
    assert x.grad is not None

    expected = case["float64"] if dtype == torch.float64 else case
    for row in case["feature_l2"]:
        if row["module"] in norms:
            assert relative_error(norms[row["module"]], row["l2"]) < 1e-6, row["module"]
    assert relative_error(logits[:, :16], expected["logits_first16"]) < tolerance
    assert relative_error(logits.sum(1), expected["logits_sum"]) < tolerance
    assert relative_error(logits.norm(dim=1), expected["logits_l2"]) < tolerance
    if dtype == torch.float64:  # kinks of ReLU and rounding make float32 gradients too blunt to judge by
        assert relative_error(x.grad.norm(), expected["input_grad_l2"]) < tolerance
        assert relative_error(x.grad.flatten()[:8], expected["input_grad_first8"]) < tolerance
