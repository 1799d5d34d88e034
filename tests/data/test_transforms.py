import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision.transforms import v2

from vizattn.data import build_transforms, is_deterministic, preprocessing_of, transform_identity
from vizattn.data.transforms import _plain_options
from vizattn.errors import VizattnError

BASE = {"input_size": [3, 32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}


@pytest.fixture(scope="module")
def image():
    pixels = np.random.default_rng(0).integers(0, 256, (45, 70, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((140, 90))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.95, 1.0])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_evaluation_equals_timm_pixel_for_pixel(image, interpolation, crop_pct, crop_mode, size):
    config = {**BASE, "input_size": [3, *size]}
    config |= {"interpolation": interpolation, "crop_pct": crop_pct, "crop_mode": crop_mode}
    theirs = timm.data.create_transform(**{**config, "input_size": (3, *size)}, is_training=False)(image)
    ours = build_transforms(config, train=False)(image)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_preprocessing_of_a_model_is_json_and_timms():
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    preprocessing = preprocessing_of(model)
    assert preprocessing == {
        "input_size": [3, 224, 224],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
    }


@pytest.mark.parametrize("augment", ["light", "standard"])
def test_augmentation_is_random_and_sized(image, augment):
    transform = build_transforms(BASE, train=True, augment=augment)
    torch.manual_seed(0)
    first, second = transform(image), transform(image)
    assert first.shape == (3, 32, 32) and first.dtype == torch.float32
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, transform(image))
    assert not is_deterministic(transform)
    with pytest.raises(ValueError, match="deterministic"):
        transform_identity(transform)


def test_light_never_flips():
    steps = build_transforms(BASE, train=True, augment="light").transforms
    assert not any(isinstance(step, (v2.RandomHorizontalFlip, v2.RandomVerticalFlip)) for step in steps)


def test_no_augmentation_equals_evaluation(image):
    train, evaluate = build_transforms(BASE, train=True), build_transforms(BASE, train=False, augment="standard")
    assert is_deterministic(train) and is_deterministic(evaluate) and is_deterministic(None)
    assert torch.equal(train(image), evaluate(image))
    assert transform_identity(train) == transform_identity(evaluate)


def test_unknown_callables_are_not_called_deterministic():
    assert not is_deterministic(v2.Compose([lambda image: image]))


def test_identity_changes_with_each_setting():
    changes = [{}, {"mean": [0.5] * 3}, {"input_size": [3, 48, 48]}, {"interpolation": "bilinear"}, {"crop_pct": 1.0}]
    changes += [{"crop_mode": mode} for mode in ("squash", "border")]
    identities = {transform_identity(build_transforms({**BASE, **change}, train=False)) for change in changes}
    assert len(identities) == len(changes)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_identity_holds_no_memory_address(crop_mode):
    for step in build_transforms({**BASE, "crop_mode": crop_mode}, train=False).transforms:
        assert not any("0x" in value for value in _plain_options(step).values())


@pytest.mark.parametrize(
    ("change", "augment", "message"),
    [
        ({}, "standart", "Did you mean 'standard'"),
        ({"crop_ptc": 1.0}, "none", "Did you mean 'crop_pct'"),
        ({"crop_mode": "centre"}, "none", "Did you mean 'center'"),
        ({"interpolation": "bicubicc"}, "none", "Did you mean 'bicubic'"),
        ({"interpolation": None}, "light", "Unknown interpolation 'None'"),
        ({"input_size": [32]}, "none", r"input_size must be \[3, height, width\]"),
        ({"input_size": 32}, "none", r"input_size must be \[3, height, width\]"),
        ({"input_size": [3, 32, 0]}, "none", r"input_size must be \[3, height, width\]"),
        ({"mean": None}, "none", "mean must be three numbers"),
        ({"std": [1, 1, 0]}, "none", "std must not be 0"),
        ({"input_size": [3, 10**30, 32]}, "none", r"input_size must be \[3, height, width\]"),
        ({"crop_pct": 1e308}, "none", "crop_pct must be a number from 0.1 to 10"),
        ({"crop_pct": "all"}, "none", "crop_pct must be a number from 0.1 to 10"),
    ],
)
def test_mistakes_get_the_closest_match(change, augment, message):
    with pytest.raises(VizattnError, match=message):
        build_transforms({**BASE, **change}, train=True, augment=augment)


def test_missing_preprocessing_is_named():
    with pytest.raises(VizattnError, match="must be a dict of input_size"):
        build_transforms(None, train=False)
    with pytest.raises(VizattnError, match="lacks mean, std"):
        build_transforms({"input_size": [3, 32, 32]}, train=False)
