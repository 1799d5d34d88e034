"""Suites, tasks on disk in each layout, and what is told about damaged ones."""

import json
import shutil
from collections import Counter
from dataclasses import replace

import pytest
from PIL import Image

from vizattn.data import available_splits, build_dataset
from vizattn.data.transfer import SUITES, available, get_suite, open_split, select_tasks
from vizattn.data.transfer.tasks import Suite, TransferTask
from vizattn.errors import VizattnError

CLASSES = 4
TASK = TransferTask("pets", "natural", CLASSES, layout="lists")
SUITE = Suite("tiny", (TASK,))
LISTS = {"train": "train800.txt", "val": "val200.txt", "trainval": "train800val200.txt", "test": "test.txt"}
COUNTS = {"train": 8, "val": 4, "test": 6}


def colour(split, index):
    return ({"train": 10, "val": 100, "test": 200}[split], index, 7)


@pytest.fixture
def root(tmp_path):
    """A small task in the community's layout."""
    lines = {split: [] for split in LISTS}
    for split, count in COUNTS.items():
        for index in range(count):
            for part in (split, "trainval") if split != "test" else (split,):
                name = f"images/{part}/{split}{index:06}.png"
                path = tmp_path / "pets" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (6, 5), colour(split, index)).save(path)
                lines[part].append(f"{name} {index % CLASSES}")
    for split, file in LISTS.items():
        (tmp_path / "pets" / file).write_text("\n".join(lines[split]) + "\n")
    return tmp_path


def edit(root, split, change):
    path = root / "pets" / LISTS[split]
    path.write_bytes(change(path.read_text()).encode())


def test_the_tasks_of_vtab_1k_are_those_of_the_paper():
    suite = SUITES["vtab-1k"]
    assert suite.groups == ["natural", "specialized", "structured"]
    assert Counter(task.group for task in suite.tasks) == {"natural": 7, "specialized": 4, "structured": 8}
    classes = {task.name: task.num_classes for task in suite.tasks}
    assert (
        sum(classes.values())
        == 100 + 102 + 47 + 102 + 37 + 10 + 397 + 2 + 10 + 45 + 5 + 8 + 6 + 6 + 4 + 16 * 2 + 18 + 9
    )
    tests = {task.name: task.splits["test"] for task in suite.tasks}
    assert tests["caltech101"] == (6084, 6085) and tests["kitti"] == (711,) and tests["dsprites_ori"] == (73728,)
    assert all(
        [task.splits[part] for part in ("train", "val", "trainval")] == [(800,), (200,), (1000,)]
        for task in suite.tasks
    )


def test_trainval_of_fgvc_is_train_and_val():
    splits = SUITES["fgvc"].task("cub200_2011").splits
    assert splits == {"train": (5394,), "val": (600,), "trainval": (5994,), "test": (5794,)}


def test_tasks_are_selected_by_name_and_group_in_the_order_of_the_suite():
    suite = get_suite("vtab-1k")
    assert len(select_tasks(suite)) == 19
    assert [task.name for task in select_tasks(suite, "svhn, dtd")] == ["dtd", "svhn"]
    assert [task.name for task in select_tasks(suite, ["specialized", "kitti", "eurosat"])][-1] == "kitti"
    assert len(select_tasks(suite, ["specialized", "kitti", "eurosat"])) == 5
    with pytest.raises(VizattnError, match="Did you mean 'natural'"):
        select_tasks(suite, "natral")
    with pytest.raises(VizattnError, match="No task"):
        select_tasks(suite, ",")


def test_all_splits_open(root):
    parts = {split: open_split(SUITE, "pets", split, root) for split in LISTS}
    assert {split: len(part) for split, part in parts.items()} == {**COUNTS, "trainval": 12}
    assert parts["train"].class_names == ["0", "1", "2", "3"]
    image, label = parts["val"][1]
    assert (image.mode, image.getpixel((0, 0)), label) == ("RGB", colour("val", 1), 1)
    assert len({part.identity for part in parts.values()}) == 4
    assert parts["train"].identity == open_split(SUITE, "pets", "train", root).identity


def test_equal_images_have_equal_digests_under_two_paths(root):
    parts = {split: open_split(SUITE, "pets", split, root) for split in LISTS}
    digests = {split: [part.digest(index) for index in range(len(part))] for split, part in parts.items()}
    assert sorted(digests["trainval"]) == sorted(digests["train"] + digests["val"])
    assert not set(digests["test"]) & set(digests["trainval"])


def test_nothing_of_the_test_split_is_touched_for_the_others(root, monkeypatch):
    opened = []
    original = open

    def watch(file, *args, **kwargs):
        opened.append(str(file))
        return original(file, *args, **kwargs)

    shutil.rmtree(root / "pets" / "images" / "test")
    (root / "pets" / "test.txt").unlink()
    (root / "pets" / "test.txt").mkdir()  # neither to be read nor to be passed over in silence
    monkeypatch.setattr("builtins.open", watch)
    monkeypatch.setattr("io.open", watch)
    for split in ("train", "val", "trainval"):
        part = open_split(SUITE, "pets", split, root)
        assert part[0] and part.identity and part.digest(0)
    assert opened and not [name for name in opened if "test.txt" in name or "images/test" in name]
    with pytest.raises(VizattnError, match="Cannot read"):
        open_split(SUITE, "pets", "test", root)


def test_a_folder_named_as_the_suite_is_found_and_spelling_is_forgiven(root):
    (root / "tiny").mkdir()
    (root / "pets").rename(root / "tiny" / "Pets")
    assert len(open_split(SUITE, "pets", "train", root)) == 8
    assert len(open_split(SUITE, "pets", "train", root / "tiny")) == 8


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\ufeff" + text.replace("\n", "  \t\n\n"),
        lambda text: "# path label\n" + text.replace("/", "\\"),
        lambda text: text.replace("images/", "./images/").replace(" ", "\t"),
        lambda text: text.replace("images/", "/somewhere/else/pets/images/"),
        lambda text: text.replace("images/", "C:\\data\\pets\\images/"),
    ],
)
def test_lists_of_other_systems_are_read(root, change):
    before = open_split(SUITE, "pets", "train", root)
    edit(root, "train", change)
    after = open_split(SUITE, "pets", "train", root)
    assert (after.paths, after.labels) == (before.paths, before.labels)


def test_paths_may_have_blanks(root):
    (root / "pets" / "images" / "train").rename(root / "pets" / "images" / "the train")
    edit(root, "train", lambda text: text.replace("/train/", "/the train/"))
    assert open_split(SUITE, "pets", "train", root)[0][1] == 0


@pytest.mark.parametrize(
    ("split", "change", "message"),
    [
        (
            "train",
            lambda text: text.replace("000002.png 2", "000002.png two"),
            r"train800.txt, line 3: .*'two'",
        ),
        ("train", lambda text: text.replace("000002.png 2", "000002.png 2.0"), r"line 3: .*integer.*'2.0'"),
        ("train", lambda text: text.replace("000002.png 2", "000002.png 4"), r"line 3: .*0 to 3, not 4"),
        ("train", lambda text: text.replace("000002.png 2", "000002.png -1"), r"line 3: .*0 to 3, not -1"),
        ("train", lambda text: text.replace("000002.png 2", "000002.png"), r"line 3: expected a path and a label"),
        ("train", lambda text: text + text.splitlines()[1], r"line 9: .*000001.png is also on line 2"),
        ("train", lambda text: "\n# nothing\n", r"train800.txt lists no image"),
        (
            "train",
            lambda text: text.replace("train000003", "lost"),
            r"1 of 8 images(.|\n)*train800.txt, line 4",
        ),
        (
            "val",
            lambda text: text + "images/train/train000001.png 1",
            r"000001.png is in train800.txt and in .*val",
        ),
        ("trainval", lambda text: text.replace("val000003.png 3", "val000003.png 2"), r"is not train and val together"),
        ("trainval", lambda text: text.split("\n", 1)[1], r"has 11 images, 2 of class 0; they have 12, 3 of class 0"),
    ],
)
def test_damage_is_told_with_file_and_line(root, split, change, message):
    edit(root, split, change)
    with pytest.raises(VizattnError, match=message):
        open_split(SUITE, "pets", split, root)


def test_all_damaged_lines_are_told_at_once(root):
    edit(
        root, "train", lambda text: text.replace("000002.png 2", "000002.png 9").replace("000005.png 1", "000005.png x")
    )
    with pytest.raises(VizattnError, match=r"line 3: .*not 9\.\n.*line 6: .*integer"):
        open_split(SUITE, "pets", "train", root)


def test_an_unreadable_image_is_named(root):
    path = root / "pets" / "images" / "train" / "train000000.png"
    path.write_bytes(b"no image")
    with pytest.raises(VizattnError, match=r"Cannot read the image .*train000000.png"):
        open_split(SUITE, "pets", "train", root)[0]


def test_trainval_is_train_and_val_where_it_has_no_list(root):
    (root / "pets" / LISTS["trainval"]).unlink()
    train, val, both = (open_split(SUITE, "pets", split, root) for split in ("train", "val", "trainval"))
    assert both.paths == train.paths + val.paths and both.labels == train.labels + val.labels


def test_another_count_is_a_warning(root):
    task = replace(TASK, splits={"test": (6, 7), "train": (800,)})
    open_split(SUITE, task, "test", root)
    with pytest.warns(UserWarning, match=r"train800.txt has 8 images; pets has 800 in train"):
        open_split(SUITE, task, "train", root)


def test_missing_tasks_say_why(root):
    assert available(SUITE, "pets", root)
    (root / "pets" / "test.txt").unlink()
    reason = available(SUITE, "pets", root)
    assert not reason and "lacks test.txt" in str(reason)
    assert "no folder svhn" in available("vtab-1k", "svhn", root).reason
    assert "--root" in available("vtab-1k", "svhn").reason
    with pytest.raises(VizattnError, match=r"no folder svhn(.|\n)*train800.txt(.|\n)*pets"):
        open_split("vtab-1k", "svhn", "train", root)


def test_json_lists_number_the_labels_of_train(tmp_path):
    task = TransferTask("birds", "natural", 3, layout="json")
    files = {"train": {"b/2.png": 17, "a/1.png": 5, "c/3.png": 40}, "val": {"a/4.png": 5}, "test": {"c/5.png": 40}}
    for split, labels in files.items():
        (tmp_path / "birds").mkdir(exist_ok=True)
        (tmp_path / "birds" / f"{split}.json").write_text(json.dumps(labels))
        for name in labels:
            (tmp_path / "birds" / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(tmp_path / "birds" / "images" / name)
    suite = Suite("mine", (task,))
    train = open_split(suite, task, "train", tmp_path)
    assert (train.labels, train.class_names) == ([1, 0, 2], ["5", "17", "40"])
    assert open_split(suite, task, "test", tmp_path).labels == [2]
    assert open_split(suite, task, "trainval", tmp_path).labels == [1, 0, 2, 0]
    (tmp_path / "birds" / "test.json").write_text('{"c/5.png": 41}')
    assert len(open_split(suite, task, "val", tmp_path)) == 1
    with pytest.raises(VizattnError, match=r"test.json: the label of c/5.png is 41"):
        open_split(suite, task, "test", tmp_path)
    (tmp_path / "birds" / "val.json").write_text('{"a/4.png": 5, "a/4.png": 5}')
    with pytest.raises(VizattnError, match=r"a/4.png is there 2 times"):
        open_split(suite, task, "val", tmp_path)
    (tmp_path / "birds" / "val.json").write_text('{"a/1.png": 5}')
    with pytest.raises(VizattnError, match=r"a/1.png is in train.json and in"):
        open_split(suite, task, "val", tmp_path)


def test_folders_of_classes(tmp_path):
    for split, counts in {"train": (10, 5), "test": (2, 1)}.items():
        for name, count in zip(("cat", "dog"), counts):
            (tmp_path / "mine" / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (4, 4), (index, 0, 0)).save(tmp_path / "mine" / split / name / f"{index}.png")
    task = TransferTask("mine", "own", 2, layout="folder")
    suite = Suite("mine", (task,))
    parts = {split: open_split(suite, task, split, tmp_path) for split in LISTS}
    assert parts["train"].class_names == ["cat", "dog"]
    assert {split: sorted(Counter(part.labels).values()) for split, part in parts.items()} == {
        "train": [4, 8],
        "val": [1, 2],
        "trainval": [5, 10],
        "test": [1, 2],
    }
    assert sorted(parts["train"].paths + parts["val"].paths) == sorted(parts["trainval"].paths)
    (tmp_path / "mine" / "test" / "cow").mkdir()
    assert len(open_split(suite, task, "train", tmp_path)) == 12
    with pytest.raises(VizattnError, match="'cow', which train lacks"):
        open_split(suite, task, "test", tmp_path)
    with pytest.raises(VizattnError, match="2 class folders; mine has 3 classes"):
        open_split(suite, replace(task, num_classes=3), "train", tmp_path)
    shutil.rmtree(tmp_path / "mine" / "test")
    assert "lacks test/" in available(suite, task, tmp_path).reason


ENTRY = {"name": "pets", "group": "mine", "num_classes": 4, "layout": "lists", "splits": {"test": [6, 7], "val": 4}}


def test_a_suite_of_ones_own(root, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"name": "mine", "tasks": [ENTRY, {**ENTRY, "name": "other", "folder": "pets"}]}))
    suite = get_suite(path)
    assert suite.task("pets").splits == {"test": (6, 7), "val": (4,)}
    assert len(open_split(str(path), "other", "test", root)) == 6
    assert get_suite(suite) is suite


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"classes": 4}, r"task 1: Unknown key 'classes'.*Did you mean 'num_classes'"),
        ({"layout": "list"}, r"task 1 \(pets\): Unknown layout 'list'. Did you mean 'lists'"),
        ({"layout": "builtin"}, "Unknown layout 'builtin'"),
        ({"num_classes": "4"}, 'num_classes must be an integer of at least 2, not "4"'),
        ({"num_classes": True}, "num_classes must be"),
        ({"splits": {"tset": 4}}, "Unknown split 'tset'. Did you mean 'test'"),
        ({"splits": {"test": 0}}, "splits.test must be a positive integer"),
        ({"group": "a,b"}, "group must be letters"),
        ({"name": "mine"}, "cannot be named 'mine'"),
        ({"class_names": ["a"]}, "class_names must be a list of 4 names"),
    ],
)
def test_mistakes_in_a_suite_are_told(tmp_path, entry, message):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"name": "mine", "tasks": [{**ENTRY, **entry}]}))
    with pytest.raises(VizattnError, match=message):
        get_suite(path)


def test_more_mistakes_in_a_suite(tmp_path):
    path = tmp_path / "mine.json"
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "must be an object with name, tasks"),
        ('{"name": "a"}', "lacks tasks"),
        ('{"name": "a", "tasks": []}', "tasks must be a list"),
        (json.dumps({"name": "a", "tasks": [ENTRY, ENTRY]}), "two tasks are named 'pets'"),
    ):
        path.write_text(text)
        with pytest.raises(VizattnError, match=message):
            get_suite(path)
    with pytest.raises(VizattnError, match="Did you mean 'vtab-1k'"):
        get_suite("vtab1k")
    with pytest.raises(VizattnError, match=r"Cannot read the suite .*none.json"):
        get_suite(tmp_path / "none.json")
    with pytest.raises(VizattnError, match="Did you mean 'svhn'"):
        open_split("vtab-1k", "shvn", "train")
    with pytest.raises(VizattnError, match="Unknown split 'tests'"):
        open_split("vtab-mini", "digits", "tests")


def test_as_the_data_set_of_a_recipe_a_stage_has_its_splits(root, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"name": "mine", "tasks": [ENTRY]}))
    options = {"suite": str(path), "task_name": "pets"}
    assert available_splits("transfer", root=root, **options) == ["train", "val"]
    assert available_splits("transfer", root=root, stage="final", **options) == ["train", "test"]
    sizes = [
        len(build_dataset("transfer", split, root=root, stage=stage, **options))
        for stage, split in (("select", "train"), ("select", "val"), ("final", "train"), ("final", "test"))
    ]
    assert sizes == [8, 4, 12, 6]
    with pytest.raises(VizattnError, match='no test split at the stage "select"'):
        build_dataset("transfer", "test", root=root, **options)
    with pytest.raises(VizattnError, match=r"Set data.task_name to a task of vtab-mini: digits"):
        build_dataset("transfer", "train")
    with pytest.raises(VizattnError, match="Unknown stage"):
        build_dataset("transfer", "train", stage="finale", **options)
