import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from vizattn.data import build_segmentation_transforms, build_transforms, is_deterministic, transform_identity
from vizattn.data.loader import build_loader
from vizattn.errors import VizattnError

BASE = {"input_size": [3, 32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}
VARIANTS = [("none", (40, 56)), ("light", (40, 56)), ("standard", (40, 56)), ("light", None), ("standard", None)]


@pytest.fixture(scope="module")
def pair():
    """A picture whose blocks have the colour of their label; label 0 fills the left part."""
    labels = np.kron(np.random.default_rng(0).integers(0, 7, (6, 8)), np.ones((15, 15))).astype(np.uint8)
    labels[:, :45] = 0
    return Image.fromarray(np.stack([labels * 30, 200 - labels * 30, labels * 10], -1)), labels


def build(train=True, **options):
    return build_segmentation_transforms({**BASE, **options.pop("change", {})}, train=train, **options)


def colours_of(labels):
    labels = labels[None]
    pixels = torch.cat([labels * 30, 200 - labels * 30, labels * 10]) / 255
    return (pixels - torch.tensor(BASE["mean"]).view(3, 1, 1)) / torch.tensor(BASE["std"]).view(3, 1, 1)


def test_evaluation_leaves_the_mask_and_sees_what_classification_sees(pair):
    image, mask = pair
    tensor, labels = build(train=False, augment="standard", crop_size=(8, 8))(image, mask)
    assert tensor.dtype == torch.float32 and labels.dtype == torch.int64
    assert np.array_equal(labels, mask)
    torch.testing.assert_close(tensor, colours_of(labels), atol=1e-5, rtol=0)
    whole = build_transforms({**BASE, "input_size": [3, 90, 120], "crop_pct": 1.0}, train=False)(image)
    torch.testing.assert_close(tensor, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(120, 90), (90, 120)])
def test_evaluation_resizes_the_short_side(size):
    tensor, labels = build(train=False, short_side=45)(Image.new("RGB", size), np.zeros(size[::-1], np.uint8))
    assert tensor.shape == (3, size[1] // 2, size[0] // 2) and labels.shape == size[::-1]


@pytest.mark.parametrize(("augment", "crop_size"), VARIANTS)
@pytest.mark.parametrize("short_side", [None, 60])
def test_training_is_sized_random_and_repeats_with_torchs_seed(pair, augment, crop_size, short_side):
    transform = build(augment=augment, crop_size=crop_size, short_side=short_side)
    torch.manual_seed(0)
    runs = [transform(*pair) for _ in range(6)]
    expected = crop_size or ((60, 80) if short_side else (90, 120))
    assert all(x.shape == (3, *expected) and y.shape == expected for x, y in runs)
    assert all(x.dtype == torch.float32 and y.dtype == torch.int64 for x, y in runs)
    assert len({x.numpy().tobytes() for x, _ in runs}) > 1
    torch.manual_seed(0)
    np.random.seed(5)
    again = pickle.loads(pickle.dumps(transform))
    for x, y in runs:
        new_x, new_y = again(*pair)
        assert torch.equal(x, new_x) and torch.equal(y, new_y)
    assert not is_deterministic(transform)
    with pytest.raises(ValueError, match="deterministic"):
        transform_identity(transform)


@pytest.mark.parametrize("augment", ["light", "standard"])
def test_image_and_mask_stay_together(pair, augment):
    """Away from the borders of the blocks the colour is that of the label, whatever the scale, crop and flip."""
    transform = build(augment=augment, crop_size=(70, 100))
    transform(*pair)
    for step in transform._steps.transforms:
        if type(step).__name__ in ("RandomBrightnessContrast", "ColorJitter"):
            step.p = 0.0
    for _ in range(30):
        tensor, labels = transform(*pair)
        around = labels.unfold(0, 9, 1).unfold(1, 9, 1)
        inside = torch.zeros_like(labels, dtype=torch.bool)
        inside[4:-4, 4:-4] = (around == labels[4:-4, 4:-4, None, None]).all(-1).all(-1) & (labels != 255)[4:-4, 4:-4]
        assert inside.float().mean() > 0.05
        difference = (tensor - colours_of(labels)).abs().amax(0)[inside]
        assert difference.max() < 0.03  # rounding to 8 bits


def test_resampling_of_a_window_equals_that_of_the_whole(pair):
    image, mask = pair
    transform = build(augment="none", crop_size=(120, 164), short_side=135)
    enlarged = np.asarray(image.resize((180, 135), Image.Resampling.BILINEAR)).astype(int)
    std, mean = (torch.tensor(BASE[key]).view(3, 1, 1) for key in ("std", "mean"))
    pixels = transform(image, mask)[0].mul(std).add(mean).mul(255).round().permute(1, 2, 0).numpy().astype(int)
    windows = (enlarged[y : y + 120, x : x + 164] for y in range(16) for x in range(17))
    assert min(np.abs(window - pixels).max() for window in windows) <= 1


def test_small_images_are_padded_with_the_mean_and_ignored():
    image, mask = Image.new("RGB", (20, 10), (255, 255, 255)), np.full((10, 20), 3, np.uint8)
    tensor, labels = build(augment="none", crop_size=(16, 24))(image, mask)
    assert (labels[:10, :20] == 3).all() and (labels == 255).sum() == 16 * 24 - 10 * 20
    assert (tensor[:, labels == 255] == 0).all() and (tensor[:, labels == 3] > 1).all()


def test_scales_cover_half_to_double():
    image, mask = Image.new("RGB", (40, 40)), np.zeros((40, 40), np.uint8)
    transform = build(augment="standard", crop_size=(100, 100))
    sides = [(transform(image, mask)[1][0] != 255).sum().item() for _ in range(100)]
    assert 20 <= min(sides) < 26 and 74 < max(sides) <= 80


def test_crops_avoid_one_class_alone():
    """Half of the crops would show nothing but the ground; of ten tries hardly all do."""
    mask = np.zeros((100, 100), np.uint8)
    mask[40:60, 40:60] = 1
    mask[:, 95:] = 255
    image = Image.new("RGB", (100, 100))

    def share_of_one(augment):
        transform = build(augment=augment, crop_size=(24, 24))
        torch.manual_seed(1)
        crops = [transform(image, mask)[1] for _ in range(150)]
        counts = [torch.bincount(crop[crop != 255], minlength=2).float() for crop in crops]
        return np.mean([bool(count.max() >= 0.75 * count.sum()) for count in counts])

    assert share_of_one("none") > 0.7 > 0.45 > share_of_one("standard")


def test_flips_and_colours_are_drawn_independently(pair):
    """With one seed for all steps, as by `Compose.set_random_seed`, a flip would always come with a change of light."""
    image, mask = Image.new("RGB", (64, 64), (120, 90, 60)), np.tile(np.arange(64, dtype=np.uint8), (64, 1))
    transform = build(augment="standard", crop_size=(24, 24))
    torch.manual_seed(0)
    seen = set()
    for _ in range(120):
        tensor, labels = transform(image, mask)
        row = labels[0][labels[0] != 255]
        plain = (torch.tensor([120, 90, 60]) / 255 - torch.tensor(BASE["mean"])) / torch.tensor(BASE["std"])
        seen.add((bool(row[0] > row[-1]), torch.allclose(tensor[:, 0, 0], plain, atol=1e-4)))
    assert seen == {(False, False), (False, True), (True, False), (True, True)}


def test_light_never_flips():
    image, mask = Image.new("RGB", (64, 64)), np.tile(np.arange(64, dtype=np.uint8), (64, 1))
    transform = build(augment="light", crop_size=(24, 24))
    assert all((transform(image, mask)[1].diff(dim=1) >= 0).all() for _ in range(20))


def test_no_augmentation_without_crop_equals_evaluation(pair):
    train, evaluate = build(), build(train=False, augment="light", crop_size=(8, 8))
    assert is_deterministic(train) and is_deterministic(evaluate)
    assert all(torch.equal(a, b) for a, b in zip(train(*pair), evaluate(*pair)))
    assert transform_identity(train) == transform_identity(evaluate)
    changes = [{"change": {"mean": [0.5] * 3}}, {"change": {"interpolation": "bicubic"}}, {"short_side": 32}]
    assert len({transform_identity(build(train=False, **change)) for change in [{}, *changes]}) == 4


def test_training_resizes_the_mask_with_the_image(pair):
    """Also where nothing else is asked for: the loss compares both pixel by pixel."""
    image, mask = pair
    resized, labels = build(short_side=45)(image, mask)
    assert resized.shape[1:] == labels.shape == (45, 60)
    assert torch.equal(resized, build(train=False, short_side=45).prepare(image))
    assert np.array_equal(labels, mask[1::2, 1::2])


def test_prepare_gives_the_image_alone(pair):
    transform = build(train=False, short_side=45)
    assert torch.equal(transform.prepare(pair[0]), transform(*pair)[0])


def test_images_of_one_batch_must_have_one_size():
    transform = build()
    items = [transform(Image.new("RGB", (side, 20)), np.zeros((20, side), np.uint8)) for side in (20, 30)]
    with pytest.raises(VizattnError, match=r"20 x 20 and 20 x 30 pixels: set data\.crop_size"):
        list(build_loader(items, 2, train=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"augment": "standart"}, "Did you mean 'standard'"),
        ({"crop_size": (0, 3)}, r"crop_size must be \[height, width\]"),
        ({"short_side": 0}, "short_side must be at least 1"),
        ({"change": {"meen": 1}}, "Did you mean 'mean'"),
        ({"change": {"interpolation": "bilinaer"}}, "Did you mean 'bilinear'"),
    ],
)
def test_mistakes_are_explained(options, message):
    with pytest.raises(VizattnError, match=message):
        build(**options)
