"""What holds for every method on every family of models it attaches to."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from rows import COMBINATIONS, METHODS, MODELS, REFUSED, create, images, randomise

import vizattn
from vizattn.adapters import attached, head_from_features, list_adapters
from vizattn.engine.task import frozen_features_each
from vizattn.errors import VizattnError

each = pytest.mark.parametrize(("method", "row"), COMBINATIONS)


def attach(method: str, row: str, **kwargs):
    torch.manual_seed(11)
    name, options = METHODS[method]
    return vizattn.attach(create(row, **kwargs), name, **options)


def head_names(model) -> tuple[str, ...]:
    names = model.pretrained_cfg["classifier"]
    return (names,) if isinstance(names, str) else tuple(names)


def test_every_method_has_a_row():
    assert {name for name, _ in METHODS.values()} == set(list_adapters())


def test_every_family_of_ours_has_a_row():
    ours = {timm.model_entrypoint(name).__module__ for name in timm.list_models()}
    rows = {timm.model_entrypoint(name).__module__ for name, _ in MODELS.values()}
    assert {module for module in ours if module.startswith("vizattn")} <= rows


@each
def test_one_training_step(method, row):
    """Frozen weights keep every bit, every trainable parameter gets a finite gradient, and what is added learns."""
    model = attach(method, row).train()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    buffers = {n: b.clone() for n, b in model.named_buffers() if not n.startswith("adapters.")}
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([p for _, p in trained], lr=0.1)
    before = [p.detach().clone() for _, p in trained]
    out = model(images(4))
    out = sum(out) if isinstance(out, tuple) else out
    out.pow(2).mean().backward()
    optimizer.step()
    assert [n for n, p in trained if p.grad is None or not p.grad.isfinite().all()] == []
    moved = [not torch.equal(p, b) for (_, p), b in zip(trained, before)]
    # the key bias of HST's attention has no effect, its gradient is zero; so has BEiT's unused mask of the class token
    assert sum(moved) >= 0.9 * len(moved)
    assert all(torch.equal(model.get_parameter(n), p) for n, p in frozen.items())
    if method != "full":
        assert all(torch.equal(model.get_buffer(n), b) for n, b in buffers.items())


@each
def test_detach_gives_back_the_original(method, row):
    reference, model = create(row), create(row)
    names = list(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    name, options = METHODS[method]
    vizattn.attach(model, name, **options)
    randomise(model)
    x = images()
    with torch.no_grad():
        changed = model(x)
        with vizattn.disabled(model):
            assert torch.equal(_first(model(x)), _first(reference(x)))
        assert torch.equal(_first(model(x)), _first(changed))
        vizattn.detach(model)
        assert torch.equal(_first(model(x)), _first(reference(x)))
    assert type(model) is type(reference)
    assert list(model.state_dict()) == names
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), reference.state_dict().values()))
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@each
def test_disabled_in_training_moves_nothing(method, row):
    """Not the statistics of frozen norms either, nor those that detach gives back."""
    reference, model = create(row), create(row)
    name, options = METHODS[method]
    vizattn.attach(model, name, **options)
    randomise(model)
    model.train()
    modes = [m.training for m in model.modules()]
    state = {n: t.clone() for n, t in model.state_dict().items()}
    x = images(4)
    with vizattn.disabled(model), torch.no_grad():
        assert torch.equal(_first(model(x)), _first(reference(x)))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    vizattn.detach(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), reference.state_dict().values()))


def _first(out):
    return out[0] if isinstance(out, tuple) else out


@each
def test_paths_agree(method, row):
    """forward = head of features; the last intermediate is the features; a copy computes the same."""
    model = attach(method, row)
    randomise(model)
    x = images()
    with torch.no_grad():
        logits = _first(model(x))
        features = model.forward_features(x)
        assert torch.equal(_first(model.forward_head(features)), logits)
        final, levels = model.forward_intermediates(x)
        assert torch.equal(final, features)
        assert len(levels) >= 2 and all(level.ndim == 4 for level in levels)
        copied = copy.deepcopy(model)
        assert torch.equal(_first(copied(x)), logits)
        randomise(copied, seed=5)
        assert not torch.equal(_first(copied(x)), logits)
        assert torch.equal(_first(model(x)), logits), "the copy shares tensors with the original"


@each
def test_samples_are_independent(method, row):
    model = attach(method, row)
    randomise(model)
    x, y = images(3), images(3, seed=1)
    y[1] = x[1]
    with torch.no_grad():
        torch.testing.assert_close(_first(model(x))[1], _first(model(y))[1], rtol=1e-5, atol=1e-6)


@each
def test_bf16_autocast(method, row):
    model = attach(method, row).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = _first(model(images(4))).float().pow(2).mean()
    loss.backward()
    reference = _first(model(images(4))).pow(2).mean()
    assert abs(loss - reference) <= 0.1 * reference + 1e-3
    if row != "deit_distilled":
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@each
def test_gradient_checkpointing(method, row):
    grads = []
    for checkpointing in (False, True):
        model = attach(method, row)
        model.set_grad_checkpointing(checkpointing)
        _first(model(images())).pow(2).mean().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and grads[0]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6)


COMPILED_ROWS = {
    "vpt_deep": ("eva02", "beit", "swin", "vit_attentions", "biformer"),
    "apla": ("halonet", "efficientvit"),
    "hst": ("vit_attentions",),
}
COMPILED = [(m, b) for m, b in COMBINATIONS if b == "vit_va" or b in COMPILED_ROWS.get(m, ())]


@pytest.mark.parametrize(("method", "row"), COMPILED)
def test_compile_without_graph_breaks(method, row):
    model = attach(method, row)
    randomise(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = images()
    torch.testing.assert_close(_first(compiled(x)), _first(model(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@each
def test_compile_forward_and_backward(method, row):
    model, reference = attach(method, row), attach(method, row)
    torch._dynamo.reset()
    _first(torch.compile(model, backend="aot_eager", fullgraph=True)(images())).pow(2).mean().backward()
    _first(reference(images())).pow(2).mean().backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("method", "row"), [(m, b) for m, b in COMBINATIONS if m in ("linear_probe", "full", "apla")])
def test_merge(method, row):
    model = attach(method, row)
    names = list(create(row).state_dict())
    randomise(model)
    x = images()
    with torch.no_grad():
        expected = _first(model(x))
        vizattn.merge(model)
        assert torch.equal(_first(model(x)), expected)
    assert not attached(model) and list(model.state_dict()) == names


@pytest.mark.parametrize("method", ["vpt_deep", "hst", "side_tuning", "efficient_probing"])
def test_merge_refused_with_reason(method):
    model = attach(method, "vit")
    with pytest.raises(VizattnError, match="cannot be merged: "):
        vizattn.merge(model)
    assert attached(model)


@pytest.mark.parametrize(("method", "row"), [(m, b) for m, rows in REFUSED.items() for b in sorted(rows)])
def test_refusal_leaves_the_model_alone(method, row):
    model, reference = create(row), create(row)
    name, options = METHODS[method]
    with pytest.raises(VizattnError, match="attach"):
        vizattn.attach(model, name, **options)
    assert type(model) is type(reference) and list(model.state_dict()) == list(reference.state_dict())
    assert all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(images()), reference(images()))


IDENTITY = [(m, b) for m, b in COMBINATIONS if m in ("linear_probe", "full", "apla")]


@pytest.mark.parametrize(("method", "row"), IDENTITY)
def test_identity_initialisation(method, row):
    with torch.no_grad():
        assert torch.equal(_first(attach(method, row)(images())), _first(create(row)(images())))


CACHED = [(m, b) for m, b in COMBINATIONS if m in ("linear_probe", "efficient_probing") and b != "deit_distilled"]


@pytest.mark.parametrize(("method", "row"), CACHED)
def test_training_from_stored_features(method, row):
    """Features as they lie in a file give the same bits as those just computed, in logits and gradients."""
    model = attach(method, row)
    randomise(model)
    x = images(3)
    features = frozen_features_each(model, x)
    torch.testing.assert_close(head_from_features(model, features), model(x), rtol=1e-4, atol=1e-5)
    model.train()
    results = []
    for inputs in (features, torch.from_numpy(np.ascontiguousarray(features.numpy()))):
        model.zero_grad()
        logits = head_from_features(model, inputs)
        logits.pow(2).mean().backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


OURS = [row for row, (name, _) in MODELS.items() if timm.model_entrypoint(name).__module__.startswith("vizattn")]


@pytest.mark.parametrize("row", OURS)
def test_a_full_bundle_makes_the_model(row, tmp_path):
    """Every argument, the pooling and the moving statistics are in it."""
    model = attach("full", row)
    model.reset_classifier(4, "max")
    randomise(model)
    again = vizattn.adapters.create_from_bundle(vizattn.save_adapter(model, tmp_path / "bundle"))
    with torch.no_grad():
        assert torch.equal(again(images()), model(images()))


LOADER = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
from rows import create, images
import vizattn
result = {}
for row, folder in json.loads(sys.argv[2]):
    model = vizattn.load_adapter(create(row, num_classes=3), folder)
    with torch.no_grad():
        out = model(images())
    result[folder] = (out[0] if isinstance(out, tuple) else out).tolist()
print(json.dumps(result))
"""


def test_save_and_load_in_a_fresh_process(tmp_path):
    """All combinations at once; the fresh model has another number of classes, which the bundle corrects."""
    expected, jobs = {}, []
    for method, row in COMBINATIONS:
        model = attach(method, row)
        randomise(model)
        folder = str(vizattn.save_adapter(model, tmp_path / f"{method}-{row}", class_names=list("abcde")))
        with torch.no_grad():
            expected[folder] = _first(model(images())).tolist()
        jobs.append((row, folder))
    here = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", LOADER, here, json.dumps(jobs)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == expected
    assert len(expected) == len(COMBINATIONS) > 60 and set(MODELS) == {row for row, _ in jobs}
