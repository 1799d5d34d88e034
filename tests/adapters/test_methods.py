"""What is particular to one method: definitions, counts, costs."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import METHODS, create, images, randomise
from torch import nn

import vizattn
from vizattn.adapters import attached, cache_level, frozen, query_maps
from vizattn.adapters.anatomy import attend, describe
from vizattn.adapters.apla import PartialLinear
from vizattn.adapters.efficient_probing import EfficientProbe
from vizattn.adapters.hst import TwoKeyAttention
from vizattn.attention import ATTENTION
from vizattn.errors import VizattnError
from vizattn.layers import mlp
from vizattn.models.biformer import LePEAttention

TIMM_TOKEN_MODELS = ["vit", "deit_distilled", "dinov2_reg", "siglip", "clip", "dinov3", "beit", "eva02"]
#: Rows `create` knows: a ViT of one attention.
OUR_ATTENTION = [f"vit_va/{name}" for name in ATTENTION if name != "softmax" and hasattr(ATTENTION[name], "project_kv")]

COUNTS = [
    ("vpt", {"num_tokens": 50}, 460_800),
    ("vpt", {"num_tokens": 50, "deep": False}, 38_400),
    ("apla", {"num_rows": 8}, 73_824),
    ("apla", {"num_rows": 128}, 1_181_184),
    ("apla", {"num_rows": 768}, 7_087_104),
    ("hst", {}, 764_840),
    ("efficient_probing", {"num_queries": 32}, 614_400),
    ("linear_probe", {}, 0),
]


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "vit_va_base_patch16_224"])
@pytest.mark.parametrize(("method", "options", "count"), COUNTS)
def test_parameter_counts_on_vit_base(name, method, options, count):
    model = timm.create_model(name, num_classes=10, device="meta")
    summary = vizattn.trainable_summary(vizattn.attach(model, method, **options))
    assert summary.without_head == count
    head = sum(p.numel() for p in model.get_classifier().parameters())
    assert summary.with_head == count + head and head > 0


class Inserted(nn.Module):
    """The published definition of deep prompts: insert tokens, run the block, strip."""

    def __init__(self, block: nn.Module, prompts: torch.Tensor, prefix: int):
        super().__init__()
        self.block, self.prompts, self.prefix = block, prompts, prefix

    def forward(self, x, *args, **kwargs):
        count = len(self.prompts)
        prompts = self.prompts.expand(len(x), -1, -1)
        # among the tokens that are not rotated, after timm's class token; in front of what vizattn's models have
        x = torch.cat([x[:, : self.prefix], prompts, x[:, self.prefix :]], dim=1)
        x = self.block(x, *args, **kwargs)
        return torch.cat([x[:, : self.prefix], x[:, self.prefix + count :]], dim=1)


@pytest.mark.parametrize("row", ["vit_va", *OUR_ATTENTION, "vit", "dinov2_reg", "siglip", "clip", "dinov3", "eva02"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_deep_prompts_equal_inserted_tokens(row, dtype):
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    model = vizattn.attach(create(row), "vpt", num_tokens=3)
    randomise(model)
    model.to(dtype)
    prompts = [p.detach().clone().requires_grad_() for p in model.adapters["vpt"].prompts]
    naive = create(row).to(dtype)
    naive.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("adapters.")})
    for i, (prompt, b) in enumerate(zip(prompts, describe(naive).blocks)):
        if hasattr(b.attn, "num_prefix_tokens") and not b.protocol:
            b.attn.num_prefix_tokens += 3
        naive.blocks[i] = Inserted(b.block, prompt, 0 if b.protocol else naive.num_prefix_tokens)
    x = images().to(dtype)
    out, expected = model(x), naive(x)
    assert (out - expected).abs().max() <= tolerance * expected.abs().max()
    out.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    for ours, theirs in zip(model.adapters["vpt"].prompts, prompts, strict=True):
        assert (ours.grad - theirs.grad).abs().max() <= 10 * tolerance * theirs.grad.abs().max()


@pytest.mark.parametrize("row", ["vit_va", *OUR_ATTENTION, *TIMM_TOKEN_MODELS])
def test_shallow_prompts_are_carried(row):
    """One set through all blocks, as when it is inserted once and taken out at the end."""
    model = vizattn.attach(create(row), "vpt", num_tokens=3, deep=False)
    randomise(model)
    naive = create(row)
    naive.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("adapters.")})
    prompts = model.adapters["vpt"].prompts[0].detach()
    anatomy = describe(naive)

    def insert(_module, args):
        return torch.cat([prompts.expand(len(args[0]), -1, -1), args[0]], dim=1), *args[1:]

    anatomy.blocks[0].block.register_forward_pre_hook(insert)
    anatomy.blocks[-1].block.register_forward_hook(lambda _m, _a, out: out[:, 3:])
    for b in anatomy.blocks:
        if hasattr(b.attn, "num_prefix_tokens") and not b.protocol:
            b.attn.num_prefix_tokens += 3
        if row == "beit":
            b.attn.forward = lambda x, a=b.attn, **kw: attend(a, x, None, 3, **kw)
    with torch.no_grad():
        torch.testing.assert_close(model(images()), naive(images()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("row", [*TIMM_TOKEN_MODELS, "swin"])
def test_attend_is_the_attention(row):
    """Without prompts `attend` computes what the model's own attention does, in outputs and gradients."""
    model, other = create(row).double(), create(row).double()
    for b in describe(other).blocks:
        b.attn.forward = lambda x, a=b.attn, **kw: attend(a, x, **kw)
    x, y = images().double().requires_grad_(), images().double().requires_grad_()
    out, expected = other(y), model(x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    out.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    torch.testing.assert_close(y.grad, x.grad, rtol=1e-10, atol=1e-12)


def test_prompts_are_projected_once_for_the_batch():
    model = vizattn.attach(create("vit"), "vpt", num_tokens=3)
    shapes = []
    model.blocks[0].norm1.register_forward_hook(lambda _m, args, _out: shapes.append(tuple(args[0].shape)))
    model(images(4))
    assert sorted(shapes) == [(1, 3, 48), (4, 17, 48)]


def test_prompt_dropout_differs_between_samples_and_is_off_in_eval():
    model = vizattn.attach(create("vit"), "vpt", num_tokens=3, dropout=0.5).train()
    x = images(1).expand(4, -1, -1, -1)
    out = model(x)
    assert not torch.allclose(out[0], out[1])
    out = model.eval()(x)
    torch.testing.assert_close(out[0], out[1])


def test_apla_trains_only_chosen_rows():
    model, reference = create("vit"), create("vit")
    vizattn.attach(model, "apla", num_rows=5).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(images()).pow(2).mean().backward()
    assert all(b.attn.proj.weight.grad is None for b in model.blocks)
    optimizer.step()
    partial = [b.attn.proj for b in model.blocks]
    chosen = [set(p.indices.tolist()) for p in partial]
    assert all(len(c) == 5 for c in chosen) and len(set(map(frozenset, chosen))) > 1
    vizattn.merge(model)
    for own, other, rows in zip(model.blocks, reference.blocks, chosen):
        changed = (own.attn.proj.weight != other.attn.proj.weight).any(dim=1)
        assert set(changed.nonzero().flatten().tolist()) <= rows and changed.any()


@given(
    d_in=st.integers(1, 9),
    d_out=st.integers(1, 9),
    rows=st.integers(1, 9),
    bias=st.booleans(),
    conv=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=50)
def test_partial_linear_gradients(d_in, d_out, rows, bias, conv, seed):
    """Against autograd through the whole weight, in float64."""
    generator = torch.Generator().manual_seed(seed)
    kind, args, apply = (nn.Conv2d, (1,), nn.functional.conv2d) if conv else (nn.Linear, (), nn.functional.linear)
    linear = kind(d_in, d_out, *args, bias=bias, dtype=torch.float64).requires_grad_(False)
    partial = PartialLinear(linear, torch.randperm(d_out, generator=generator)[: min(rows, d_out)])
    with torch.no_grad():
        partial.rows.add_(torch.randn(partial.rows.shape, generator=generator))
    shape = (2, d_in, 3, 2) if conv else (2, 3, d_in)
    x = torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
    y = x.detach().clone().requires_grad_()
    weight, offset = partial.merged()
    weight.requires_grad_()
    torch.testing.assert_close(partial(x), apply(y, weight, offset))
    partial(x).pow(2).sum().backward()
    apply(y, weight, offset).pow(2).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(partial.rows.grad, weight.grad[partial.indices])
    assert torch.autograd.gradcheck(lambda x: partial(x), (x,))


def test_partial_linear_keeps_the_layers_own_way_in_inference():
    class Rounded(nn.Linear):
        def forward(self, input):
            return nn.functional.linear(input, self.weight, self.bias).round(decimals=1)

    layer, x = Rounded(4, 4), torch.randn(3, 4)
    partial = PartialLinear(layer, torch.tensor([1, 2]))
    with torch.no_grad():
        assert torch.equal(partial(x), layer(x))


@given(dim=st.sampled_from([4, 8, 24]), tokens=st.integers(1, 7), batch=st.integers(1, 3), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_two_key_attention_is_softmax_attention(dim, tokens, batch, seed):
    torch.manual_seed(seed)
    attention = TwoKeyAttention(dim, 2).double()
    x = torch.randn(batch, tokens, dim, dtype=torch.float64, requires_grad=True)
    pair = torch.randn(batch, 2, dim, dtype=torch.float64, requires_grad=True)

    def heads(t):
        return t.unflatten(-1, (2, -1)).transpose(1, 2)

    q, k, v = heads(attention.q(x)), heads(attention.k(pair)), heads(attention.v(pair))
    scores = (q @ k.transpose(-2, -1) * (dim // 2) ** -0.5).softmax(-1)
    expected = attention.proj((scores @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, pair), expected)
    ours = torch.autograd.grad(attention(x, pair).pow(2).sum(), [x, pair, attention.q.weight, attention.proj.weight])
    naive = torch.autograd.grad(expected.pow(2).sum(), [x, pair, attention.q.weight, attention.proj.weight])
    for a, b in zip(ours, naive):
        torch.testing.assert_close(a, b)


@given(
    queries=st.sampled_from([1, 2, 4]), d_out=st.sampled_from([1, 2]), tokens=st.integers(1, 6), seed=st.integers(0, 9)
)
@settings(deadline=None, max_examples=20)
def test_efficient_probe_is_the_published_sum(queries, d_out, tokens, seed):
    """Project every token, then pool: the order of the definition."""
    torch.manual_seed(seed)
    dim = 16
    probe = EfficientProbe(dim, queries, d_out).double()
    with torch.no_grad():
        probe.queries.normal_()
    x = torch.randn(2, tokens, dim, dtype=torch.float64)
    values = probe.v(x).unflatten(-1, (queries, -1))  # B, N, Q, E/Q
    maps = (torch.einsum("qd,bnd->bqn", probe.queries, x) / dim**0.5).softmax(-1)
    torch.testing.assert_close(probe.attention(x), maps)
    torch.testing.assert_close(probe(x), torch.einsum("bqn,bnqe->bqe", maps, values).flatten(1))


@pytest.mark.parametrize("row", ["vit_va", "dinov2_reg", "siglip", "swin"])
def test_query_maps(row):
    model = vizattn.attach(create(row), "efficient_probing", num_queries=4)
    maps = query_maps(model, images())
    assert maps.shape[:2] == (2, 4) and maps.shape[2] == maps.shape[3] >= 4
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, 4))


@pytest.mark.parametrize("row", ["nat", "efficientvit"])
def test_query_maps_of_a_pyramid(row):
    model = vizattn.attach(create(row), "efficient_probing", num_queries=4)
    x = torch.randn(2, 3, 32, 64)
    with torch.no_grad():
        queries = model.adapters["efficient_probing"].probe.queries
        scores = torch.einsum("qc,bchw->bqhw", queries, model.forward_features(x))
        expected = (scores.flatten(2) / model.num_features**0.5).softmax(-1).view_as(scores)
        torch.testing.assert_close(query_maps(model, x), expected)
    assert expected.shape[3] == 2 * expected.shape[2]


def test_probing_with_and_without_the_class_token():
    model = create("vit")
    x = images()
    features = create("vit")
    features.norm = nn.Identity()
    tokens = features.forward_features(x)
    for include_cls, expected in ((False, tokens[:, 1:]), (True, tokens)):
        vizattn.attach(model, "efficient_probing", num_queries=4, include_cls=include_cls)
        assert torch.equal(attached(model)[0].module.tokens(model.forward_features(x)), expected)
        vizattn.detach(model)
    with pytest.raises(VizattnError, match="class token"):
        vizattn.attach(create("siglip"), "efficient_probing", num_queries=4, include_cls=True)


@pytest.mark.parametrize("row", ["vit", "nat"])
def test_methods_that_compose(row):
    x = images()
    for first, second in (("vpt", "efficient_probing"), ("apla", "efficient_probing"), ("vpt", "apla")):
        model = create(row)
        options = {"vpt": {"num_tokens": 2}, "apla": {"num_rows": 4}, "efficient_probing": {"num_queries": 4}}
        vizattn.attach(model, first, **options[first])
        vizattn.attach(model, second, **options[second])
        randomise(model)
        out = model.train()(x)
        out.pow(2).mean().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        assert cache_level(model) is None
        model.eval()
        with torch.no_grad():
            before = model(x)
            with vizattn.disabled(model):
                assert torch.equal(model(x), create(row)(x))
            assert torch.equal(model(x), before)
        vizattn.detach(model)
        with torch.no_grad():
            assert torch.equal(model(x), create(row)(x))


def test_adapters_that_do_not_compose_are_refused():
    model = vizattn.attach(create("vit"), "hst", widths=(8, 8, 16, 16), num_heads=(2, 2, 4, 4))
    with pytest.raises(VizattnError, match="does not compose with 'hst'"):
        vizattn.attach(model, "vpt")
    assert [a.method for a in attached(model)] == ["hst"]


def test_reset_classifier_while_attached():
    hst = {"widths": (8, 8, 16, 16), "num_heads": (2, 2, 4, 4)}
    probing = {"num_queries": 4, "d_out": 2}
    cases = (("vpt", {}, None), ("efficient_probing", probing, None), ("linear_probe", {}, "avg"), ("hst", hst, None))
    for method, options, pool in cases:
        model = vizattn.attach(create("vit"), method, **options)
        model.reset_classifier(9, pool)
        assert model(images()).shape == (2, 9)
        assert all(p.requires_grad for p in model.get_classifier().parameters())
        vizattn.detach(model)
        with torch.no_grad():
            assert torch.equal(model(images()), create("vit")(images()))


@pytest.mark.parametrize("name", ["resnet18", "xcit_nano_12_p16_224", "swinv2_cr_tiny_224"])
def test_unknown_architectures_are_refused_with_the_list(name):
    model = timm.create_model(name)
    with pytest.raises(
        VizattnError, match=r"Supported: vizattn's backbones.* Any timm model takes: full, linear_probe"
    ):
        vizattn.attach(model, "vpt")
    assert vizattn.attach(model, "linear_probe") is model


def test_unknown_names():
    with pytest.raises(VizattnError, match="Did you mean 'vpt'"):
        vizattn.attach(create("vit"), "vtp")
    with pytest.raises(VizattnError, match="Did you mean 'num_tokens'"):
        vizattn.attach(create("vit"), "vpt", num_token=3)
    with pytest.raises(VizattnError, match="linear_probe' has no options"):
        vizattn.attach(create("vit"), "linear_probe", lr=1)


def test_a_parameter_without_gradient_is_noticed(monkeypatch):
    """As when an attention goes around the module that an adapter wrapped."""
    monkeypatch.setattr(PartialLinear, "forward", lambda self, x: nn.functional.linear(x, self.weight, self.bias))
    model = create("vit")
    with pytest.raises(VizattnError, match=r"no gradient reaches blocks\.0\.attn\.proj\.rows"):
        vizattn.attach(model, "apla", num_rows=3)
    assert not attached(model) and all(p.requires_grad for p in model.parameters())


def test_frozen_parts_stay_in_eval_mode():
    model = create("vit", drop_path_rate=0.5, attn_drop_rate=0.5, pos_drop_rate=0.5)
    vizattn.attach(model, "vpt", num_tokens=2).train()
    assert model.training
    with torch.no_grad():
        assert torch.equal(model(images()), model(images()))
    vizattn.detach(model)
    assert model.training
    with torch.no_grad():
        assert not torch.equal(model(images()), model(images()))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("row", ["vit", "vit_va"])
def test_frozen_mlps_pass_few_tokens_at_a_time_while_others_train(row, monkeypatch):
    model, whole = (vizattn.attach(create(row), "vpt", num_tokens=2).train() for _ in range(2))
    whole.load_state_dict(model.state_dict())
    seen, tokens = [], []
    layer, passed, parts = model.blocks[0].mlp, mlp._pass, mlp._Parts.apply
    monkeypatch.setattr(mlp, "_pass", lambda layer, x: seen.append(x.shape[:2].numel()) or passed(layer, x))
    monkeypatch.setattr(mlp._Parts, "apply", lambda x, *rest: tokens.append((len(x), rest[-1])) or parts(x, *rest))
    x = images(3)
    whole(x).pow(2).sum().backward()
    assert seen == [3 * 17] * len(model.blocks) and not tokens
    monkeypatch.setattr(mlp, "AT_ONCE", 17 * layer.fc1.out_features)
    seen.clear()
    copied = copy.deepcopy(model)
    copied(x).pow(2).sum().backward()
    assert not seen and tokens == [(3 * 17, 3)] * len(model.blocks)
    for a, b in zip(copied.parameters(), whole.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        model(x)
    assert seen == ([3 * 17] if row == "vit" else [17] * 3) * len(model.blocks)  # timm's do as before without gradients
    if row == "vit":
        torch.jit.script(model.blocks[0].mlp)
    torch.jit.trace(model, x)
    vizattn.detach(model)
    seen.clear()
    model(x)
    assert seen == ([] if row == "vit" else [3 * 17] * len(model.blocks))


@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}, {"qk_norm": True}, {"attn_drop_rate": 0.5}])
def test_frozen_attentions_have_one_gradient_for_queries_keys_and_values(options, monkeypatch):
    """All else is timm's own."""
    model, seen = create("vit", **options), []
    copied = copy.deepcopy(model)
    packed = frozen.packed_softmax_attention
    monkeypatch.setattr(frozen, "packed_softmax_attention", lambda *args: seen.append(1) or packed(*args))
    vizattn.attach(model, "apla", num_rows=model.embed_dim)
    attn, before = model.blocks[1].attn, copied.blocks[1].attn
    seen.clear()
    tokens = torch.randn(3, 17, model.embed_dim, requires_grad=True)
    with torch.no_grad():
        assert torch.equal(attn(tokens), before(tokens))
    mask = torch.rand(17, 17) < 0.7
    mask.fill_diagonal_(True)
    for kwargs in ({"attn_mask": mask}, {"is_causal": True}):
        torch.testing.assert_close(attn(tokens, **kwargs), before(tokens, **kwargs))
    assert not seen
    grads = [torch.autograd.grad(each(tokens).pow(2).sum(), tokens)[0] for each in (attn, before)]
    assert seen == ([] if "qk_norm" in options else [1])
    called = []
    hook = attn.norm.register_forward_pre_hook(lambda *_: called.append(1))
    attn(tokens)
    hook.remove()
    assert called == [1]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    alone = vizattn.attach(create("vit", **options), "linear_probe").blocks[0].attn
    torch.testing.assert_close(torch.jit.script(alone)(tokens), alone(tokens))
    vizattn.detach(model)
    assert type(attn) is type(before)


def test_hst_side_maps():
    model = vizattn.attach(create("vit", img_size=(64, 96)), "hst", widths=(8, 8, 16, 24), num_heads=(2, 2, 4, 4))
    x = torch.randn(2, 3, 64, 96)
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 16, 24), (8, 8, 12), (16, 4, 6), (24, 2, 3)]
    assert torch.equal(model.forward_features(x), maps[-1])
    assert [tuple(m.shape[1:]) for m in model.forward_intermediates(x, indices=[1, 3], intermediates_only=True)] == [
        (8, 8, 12),
        (24, 2, 3),
    ]
    assert model.num_features == model.head_hidden_size == 24


def test_disabled_and_detach_after_moving_the_model():
    for method, options in (("efficient_probing", {"num_queries": 4}), ("vpt", {"num_tokens": 2}), ("apla", {})):
        model = vizattn.attach(create("vit"), method, **options).double()
        x = images().double()
        reference = create("vit").double()
        with torch.no_grad():
            adapted = model(x)
            with vizattn.disabled(model):
                assert torch.equal(model(x), reference(x))
            assert torch.equal(model(x), adapted)
            vizattn.detach(model)
            assert torch.equal(model(x), reference(x))


def test_disabled_gives_back_flags_and_refuses_to_attach():
    model = vizattn.attach(create("vit"), "vpt", num_tokens=2)
    flags = [p.requires_grad for p in model.parameters()]
    with vizattn.disabled(model):
        assert all(p.requires_grad for p in model.parameters())
        with pytest.raises(VizattnError, match="disabled"):
            vizattn.attach(model, "apla")
    assert [p.requires_grad for p in model.parameters()] == flags


def test_an_adapted_model_can_be_pickled():
    for method, options in (("vpt", {"num_tokens": 2}), ("vpt", {"num_tokens": 2, "deep": False}), ("apla", {})):
        model = vizattn.attach(create("vit"), method, **options)
        randomise(model)
        again = pickle.loads(pickle.dumps(model))
        with torch.no_grad():
            assert torch.equal(again(images()), model(images()))
        vizattn.detach(again)
        assert type(again) is type(create("vit"))


@pytest.mark.parametrize("method", ["vpt", "hst"])
def test_attention_mask_leaves_inserted_tokens_in(method):
    options = {"vpt": {"num_tokens": 2, "deep": False}, "hst": {"widths": (8, 8, 16, 16), "num_heads": (2, 2, 4, 4)}}
    model = vizattn.attach(create("vit"), method, **options[method])
    everything = torch.ones(17, 17, dtype=torch.bool)
    with torch.no_grad():
        out = model(images(), attn_mask=everything)
        torch.testing.assert_close(out, model(images()))
        assert not torch.allclose(model(images(), attn_mask=everything.tril()), out)
    with pytest.raises(VizattnError, match="causal"):
        model(images(), is_causal=True)


WRONG_VALUES = [
    ("vpt", {"num_tokens": "abc"}),
    ("vpt", {"num_tokens": 2.5}),
    ("vpt", {"num_tokens": True}),
    ("vpt", {"deep": "no"}),
    ("vpt", {"project": -1}),
    ("apla", {"num_rows": "8"}),
    ("apla", {"seed": -1}),
    ("hst", {"widths": 3}),
    ("hst", {"widths": ()}),
    ("hst", {"num_heads": (2, 0, 1, 1)}),
    ("hst", {"drop_path": 1.5}),
    ("hst", {"mlp_ratio": 0}),
    ("efficient_probing", {"num_queries": 2.0}),
    ("side_tuning", {"width": 0}),
]


@pytest.mark.parametrize(("method", "options"), WRONG_VALUES)
def test_wrong_option_values(method, options):
    with pytest.raises(VizattnError, match=f"{method}: "):
        vizattn.attach(create("vit"), method, **options)


def test_output_dict():
    for method, options in (("side_tuning", {"width": 8}), ("hst", {"widths": (8,), "num_heads": (2,)})):
        model = vizattn.attach(create("vit"), method, **options)
        out = model.forward_intermediates(images(), output_dict=True)
        final, levels = model.forward_intermediates(images())
        assert torch.equal(out["image_features"], final)
        assert all(torch.equal(a, b) for a, b in zip(out["image_intermediates"], levels, strict=True))


def test_no_timm_model():
    for method in vizattn.list_adapters():
        with pytest.raises(VizattnError, match="Linear"):
            vizattn.attach(nn.Linear(2, 2), method)


def test_extra_keys_of_biformers_last_stage():
    torch.manual_seed(0)
    attn = LePEAttention(16, 2).double()
    x, tokens = torch.randn(2, 6, 16, dtype=torch.float64), torch.randn(1, 3, 16, dtype=torch.float64)
    everything = torch.cat([x, tokens.expand(2, -1, -1)], dim=1)
    q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in attn.qkv(everything).chunk(3, dim=-1))
    mixed = (q[:, :, :6] @ k.mT * 8**-0.5).softmax(-1) @ v
    local = attn.lepe(x.unflatten(1, (2, 3)).permute(0, 3, 1, 2)).flatten(2).mT
    expected = attn.proj(mixed.transpose(1, 2).flatten(2) + local)
    torch.testing.assert_close(attn(x, (2, 3), attn.project_kv(tokens)), expected)


def test_norms_are_folded_after_merging_only():
    model = vizattn.attach(create("efficientvit"), "apla", num_rows=5)
    randomise(model)
    with pytest.raises(VizattnError, match="Cannot fuse a model with adapters"):
        vizattn.fuse(model)
    with torch.no_grad():
        expected = model(images())
        fused = vizattn.fuse(vizattn.merge(model))
        torch.testing.assert_close(fused(images()), expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for stage in fused.stages for m in stage.modules())


@pytest.mark.parametrize("method", ["efficient_probing", "hst"])
def test_a_head_with_batch_statistics_refuses_one_image_to_train_on(method):
    model = create("vit")
    model = vizattn.attach(model, METHODS[method][0], **METHODS[method][1]).train()
    with pytest.raises(VizattnError, match="batch size"):
        model(images(1))
    assert model.eval()(images(1)).shape[0] == 1
