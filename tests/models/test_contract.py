"""What every backbone promises beyond timm's own tests (tools/timm_suite.py): any size, exports, exact features."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from families import FAMILIES, create, images

from vizattn import VizattnError

every_family = pytest.mark.parametrize("family", FAMILIES)
CASES = [(family, size) for family, row in FAMILIES.items() for size in row.sizes]
every_size = pytest.mark.parametrize(("family", "size"), CASES, ids=[f"{f}-{h}x{w}" for f, (h, w) in CASES])


@every_size
def test_any_size_in_evaluation_and_training(family: str, size: tuple[int, int]) -> None:
    model = create(family)
    with torch.no_grad():
        logits = model(images(size, batch=1))
    assert logits.shape == (1, 5)
    assert logits.isfinite().all()
    model.train()(images(size)).pow(2).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert not [name for name, grad in gradients.items() if grad is None or not grad.isfinite().all()]


@every_family
def test_one_image_trains(family: str) -> None:
    model = create(family).train()
    model(images(FAMILIES[family].sizes[2], batch=1)).pow(2).sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


@every_size
def test_samples_are_independent(family: str, size: tuple[int, int]) -> None:
    model = create(family).double()
    x = images(size, batch=3).double()
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]), rtol=1e-9, atol=1e-10)


@every_size
def test_feature_maps(family: str, size: tuple[int, int]) -> None:
    row = FAMILIES[family]
    model = create(family, features_only=True)
    assert tuple(model.feature_info.reduction()) == row.strides
    maps = model(images(size))
    expected = [
        (2, channels, -(-size[0] // stride), -(-size[1] // stride))
        for channels, stride in zip(model.feature_info.channels(), row.strides)
    ]
    assert [tuple(m.shape) for m in maps] == expected


@every_size
def test_intermediates_end_in_the_features(family: str, size: tuple[int, int]) -> None:
    model = create(family)
    x = images(size)
    final, maps = model.forward_intermediates(x)
    features = model.forward_features(x)
    assert torch.equal(final, features)
    if features.ndim == 4:
        assert torch.equal(model.forward_intermediates(x, norm=True)[1][-1], features)
    last = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    assert torch.equal(last[0], maps[0])


@every_family
def test_forward_is_features_then_head(family: str) -> None:
    model = create(family)
    x = images(FAMILIES[family].sizes[2])
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features), model(x))
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)


@every_family
def test_gradient_checkpointing_changes_nothing(family: str) -> None:
    x = images(FAMILIES[family].sizes[2])
    grads = []
    for enable in (False, True):
        model = create(family)
        model.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        model(x).pow(2).sum().backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(grads[1], grads[0])


@every_family
def test_channels_last(family: str) -> None:
    model = create(family).double()
    x = images(FAMILIES[family].sizes[2]).double()
    expected = model(x)
    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-10)


@every_family
def test_bf16_autocast(family: str) -> None:
    model = create(family)
    x = images(FAMILIES[family].sizes[0])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = model(x).float()
    with torch.no_grad():
        high = model(x)
    assert (low - high).norm() < 0.1 * high.norm()


@every_family
def test_input_channels_and_native_size(family: str) -> None:
    model = create(family, in_chans=1)
    x = images((64, 48))[:, :1]
    before = model(x)
    assert before.shape == (2, 5)
    if hasattr(model, "set_input_size"):
        model.set_input_size((64, 48))
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


@every_family
def test_compiles_without_graph_breaks(family: str) -> None:
    torch._dynamo.reset()
    model = create(family)
    x = images(FAMILIES[family].sizes[2])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    compiled(x).sum().backward()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@every_family
def test_scripts(family: str) -> None:
    model = create(family)
    x = images(FAMILIES[family].sizes[2])
    torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=1e-4, atol=1e-5)


def dynamic_shapes(size_too: bool) -> Any:
    from torch.export import Dim

    size = {2: Dim.DYNAMIC, 3: Dim.DYNAMIC} if size_too else {}
    return ({0: Dim("batch", min=1, max=64), **size},)


@every_family
def test_torch_export_with_a_free_batch_and_size(family: str) -> None:
    row = FAMILIES[family]
    model = create(family)
    program = torch.export.export(model, (images(row.sizes[0]),), dynamic_shapes=dynamic_shapes(row.dynamic_size))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    restored = torch.export.load(file).module()
    for batch, size in ((1, row.sizes[0]), (5, row.sizes[2] if row.dynamic_size else row.sizes[0])):
        x = images(size, batch=batch)
        torch.testing.assert_close(restored(x), model(x), rtol=1e-4, atol=1e-5)


@every_family
def test_onnx_runs_elsewhere(family: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    row = FAMILIES[family]
    model = create(family)
    file = tmp_path / "model.onnx"
    torch.onnx.export(
        model,
        (images(row.sizes[0]),),
        file,
        input_names=["image"],
        dynamic_shapes=dynamic_shapes(row.dynamic_onnx),
        dynamo=True,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch, size in ((1, row.sizes[0]), (3, row.sizes[2] if row.dynamic_onnx else row.sizes[0])):
        x = images(size, batch=batch)
        (logits,) = session.run(None, {"image": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(x).detach(), rtol=1e-3, atol=1e-4)


@every_family
def test_cards_of_timm(family: str) -> None:
    cfg = timm.get_pretrained_cfg(FAMILIES[family].name)
    assert cfg is not None
    assert cfg.license
    assert str(cfg.paper_ids).startswith("arXiv:")


@every_family
def test_pruned_to_its_first_stage(family: str) -> None:
    """Features end there, and a new head fits them."""
    model = create(family)
    if family == "efficientvit":
        pytest.skip("the norm of its head has the width of the last stage")
    model.prune_intermediate_layers([0])
    x = images(FAMILIES[family].sizes[2])
    final, maps = model.forward_intermediates(x)
    assert len(maps) == 1
    model.reset_classifier(7, "avg")
    assert model(x).shape == (2, 7)
    assert final.shape == model.forward_features(x).shape


@every_family
def test_head_of_a_converted_model(family: str) -> None:
    model = create(family).double()
    model.reset_classifier(0)
    model.reset_classifier(7)
    assert model(images(FAMILIES[family].sizes[0]).double()).dtype == torch.float64


@every_family
def test_weights_without_a_stem_are_refused(family: str) -> None:
    model = create(family)
    convert = sys.modules[timm.model_entrypoint(FAMILIES[family].name).__module__].checkpoint_filter_fn
    state = model.state_dict()
    convert(dict(state), model)
    del state[f"{model.default_cfg['first_conv']}.weight"]
    with pytest.raises(VizattnError, match="1 missing"):
        convert(state, model)
