"""The groups: what they measure, that each case can be built and run, and mistakes in the choice."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm

from vizattn.bench import GROUPS, Case, Options, Unavailable, cases_of
from vizattn.bench.adapters import METHODS
from vizattn.bench.backbones import DEFAULT, UNIT, peer_of
from vizattn.bench.startup import PAIRS
from vizattn.errors import VizattnError


def names(cases: list[Case]) -> list[tuple[str, str]]:
    return [(case.name, case.variant) for case in cases]


@pytest.mark.parametrize("group", GROUPS)
def test_every_comparison_has_one_reference(group: str, tmp_path: Path) -> None:
    units: dict[tuple[str, ...], int] = {}
    cases = cases_of(group, Options(folder=tmp_path))
    for case in cases:
        units[case.comparison] = units.get(case.comparison, 0) + case.reference
    assert set(units.values()) == {1} and any(case.ours for case in cases)
    assert len({(*case.comparison, case.name, case.variant) for case in cases}) == len(cases)
    assert list(tmp_path.iterdir()) == []  # files are written when they are needed


def test_backbones_are_registered_and_peers_are_of_their_size() -> None:
    ours = [*DEFAULT, *PAIRS]
    assert all(timm.is_model(name) for name in ours)
    for name, peer in [(name, peer_of(name)) for name in DEFAULT] + [*PAIRS.items()]:
        assert peer is not None and timm.is_model(peer), name
    assert peer_of("efficientvit_va_m0") == "efficientvit_m0" and peer_of("nat_nano") is None


def test_backbones_run_in_each_variant() -> None:
    options = Options(
        models=("efficientvit_va_nano",),
        sizes=((32, 32),),
        batches=(1,),
        modes=("forward",),
        variants=("eager", "fuse+channels_last"),
    )
    cases = cases_of("backbones", options)
    assert names(cases) == [
        (UNIT, "eager"),
        (UNIT, "channels_last"),
        ("efficientvit_va_nano", "eager"),
        ("efficientvit_va_nano", "fuse+channels_last"),
    ]
    for case in cases[2:]:
        work = case.build()
        assert work.run().shape == (1, 52) and work.images == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", ["fp32", "amp", "bf16"])
def test_backbones_train_in_each_type(dtype: str) -> None:
    options = Options(models=("vit_va_nano_patch4_32",), batches=(2,), modes=("train",), dtypes=(dtype,))
    [case] = [case for case in cases_of("backbones", options) if case.ours]
    assert case.build().run().isfinite()  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", ["train", "forward"])
@pytest.mark.parametrize("name", METHODS)
def test_adapters_run(name: str, mode: str) -> None:
    options = Options(models=("vit_va_nano_patch4_32",), batches=(2,), modes=(mode,))
    [case] = [case for case in cases_of("adapters", options) if case.name == name]
    try:
        work = case.build()
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert work.run().isfinite().all()  # type: ignore[attr-defined]


def test_data_loads_every_file(tmp_path: Path) -> None:
    options = Options(folder=tmp_path, sizes=((40, 60),), batches=(4,))
    cases = [
        case for case in cases_of("data", options) if "1 workers" not in case.name and "2 workers" not in case.name
    ]
    built = {(case.subject, case.name): case.build() for case in cases}
    for case, work in built.items():
        assert work.images == 96, case
    items = built["classification", "vizattn: standard"].run()
    assert len(items) == 96 and items[0][0].shape == (3, 224, 224)  # type: ignore[arg-type,index]
    assert {path.name for path in tmp_path.iterdir()} == {"pictures-40x60-96", "pairs-40x60-96"}


def test_startup_starts_interpreters(tmp_path: Path) -> None:
    [case] = [case for case in cases_of("startup", Options(folder=tmp_path)) if case.name == "vizattn --version"]
    assert b"vizattn" in case.build().run().stdout  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "group, options, only, message",
    [
        ("op", Options(), (), "Unknown group 'op'. Did you mean 'ops'"),
        ("startup", Options(batches=(2,)), (), "The group startup has no choice of batches; it has none"),
        ("data", Options(models=("nat_tiny",)), (), "The group data has no choice of models; it has batches, sizes"),
        ("ops", Options(), ("neighbourhood",), "Unknown subject of ops 'neighbourhood'. Did you mean 'neighborhood'"),
        ("ops", Options(variants=("fuse",)), (), "Unknown variant"),
        ("ops", Options(dtypes=("amp",)), (), "Ops have no autocast"),
        ("backbones", Options(models=("nat_tinny",)), (), "Unknown backbone 'nat_tinny'. Did you mean 'nat_tiny'"),
        ("backbones", Options(variants=("fuse",)), (), "A fused model is for inference"),
        ("backbones", Options(variants=("eager+fuse",)), (), "eager stands alone"),
        ("adapters", Options(variants=("fuse",)), (), "Unknown variant 'fuse'"),
    ],
)
def test_mistakes(group: str, options: Options, only: tuple[str, ...], message: str) -> None:
    with pytest.raises(VizattnError, match=message):
        cases_of(group, options, only)


def test_a_choice_keeps_the_reference() -> None:
    cases = cases_of("ops", Options(modes=("forward",)), ["halo: vizattn"])
    assert [case.name for case in cases] == ["vizattn", "full softmax"]


def test_what_only_a_reference_is_named_brings_no_comparison_unless_alone() -> None:
    ops = Options(modes=("forward",))
    assert {case.subject for case in cases_of("ops", ops, ["softmax"])} == {"softmax"}  # a "full softmax" is in all
    assert {case.name for case in cases_of("ops", ops, ["full softmax"])} == {"full softmax"}


@pytest.mark.parametrize("size", [(28, 56), (56, 28)])
def test_maps_that_a_peer_does_not_take_are_told(size: tuple[int, int]) -> None:
    cases = cases_of("ops", Options(modes=("forward",), sizes=(size,)), ["halo: timm"])
    [peer] = [case for case in cases if case.name == "timm"]
    with pytest.raises(Unavailable, match="maps that blocks of 8 divide"):
        peer.build()
