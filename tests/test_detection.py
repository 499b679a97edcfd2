"Detection: sets of boxes and their mistakes, detectors, predictions, average precision, transfers"

import ast
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
import torchvision
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from ftcl import detection, record
from ftcl.checkpoint import read_checkpoint
from ftcl.core import InputError, native_precision
from ftcl.data import shuffled
from ftcl.detection import Detections, Picture, as_coco, average_precision, box_splits
from ftcl.detection import build_detector, canvases, load_detections, predict, read_coco
from ftcl.detection import read_predictions, read_voc, start_encoder, transfer, transfer_table
from ftcl.detection import write_predictions
from ftcl.encoder import Encoder
from ftcl.train import pretrain

ROOT = Path(__file__).parent.parent
DATA = Path(os.path.expanduser(os.environ.get("FTCL_DATA", "")))
BCCD = DATA / "bccd"
needs_bccd = pytest.mark.skipif(
    not (DATA.name and BCCD.is_dir()), reason="needs bccd in $FTCL_DATA"
)
TINY = dict(size=64, rois=16, epochs=2, n_images=4, progress=False)
pytestmark = pytest.mark.usefixtures("one_thread")


# Files in both layouts


def voc_object(name="a", box=(2, 3, 10, 12), more=""):
    tags = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    corners = "".join(f"<{tag}>{number}</{tag}>" for tag, number in tags)
    return f"<object><name>{name}</name>{more}<bndbox>{corners}</bndbox></object>"


def voc(folder, images, split="train", size=(20, 16), tagged=True):
    "A set in Pascal VOC's layout: name of each image -> its objects"
    for name in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, objects in images.items():
        pixels = np.full((size[1], size[0], 3), 90, np.uint8)
        detection.Image.fromarray(pixels).save(folder / f"JPEGImages/{name}.png")
        tags = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" * tagged
        text = f"<annotation>{tags}{''.join(objects)}</annotation>"
        (folder / f"Annotations/{name}.xml").write_text(text)
    (folder / f"ImageSets/Main/{split}.txt").write_text("\n".join(images) + "\n")
    return folder


def coco(folder, split="train", data=None, **changes):
    "A set in COCO's layout, some of its lists replaced; gives the JSON file"
    data = canvases(3, size=32) if data is None else data
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    (folder / split).mkdir(exist_ok=True)
    for picture in data.pictures:
        (folder / split / f"{picture.id}.png").write_bytes(picture.item["bytes"])
    file = folder / f"annotations/instances_{split}.json"
    file.write_text(json.dumps(as_coco(data) | changes))
    return file


def refusal(function, *arguments, **named):
    with pytest.raises(InputError) as caught:
        function(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is read


@needs_bccd
def test_bccd_is_read_whole_but_for_its_two_boxes_without_area(capsys):
    sets = {split: read_voc(BCCD, split) for split in ("train", "val", "test")}
    assert [len(data) for data in sets.values()] == [205, 87, 72]
    assert sum(data.n_boxes for data in sets.values()) == 4155 + 372 + 361 - 2
    for data in sets.values():
        assert data.classes == ["Platelets", "RBC", "WBC"]
        for picture in data.pictures:
            assert (picture.width, picture.height) == (640, 480)
            assert (picture.boxes[:, :2] >= 0).all()
            assert (picture.boxes[:, 2] <= 640).all() and (picture.boxes[:, 3] <= 480).all()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("1 box without area left out" in line for line in lines)
    assert "BloodImage_00338.xml" in "".join(lines) and "BloodImage_00343.xml" in "".join(lines)


def test_voc_counts_pixels_from_one_and_both_ends(tmp_path):
    data = read_voc(voc(tmp_path / "v", {"x": [voc_object(box=(1, 1, 20, 16))]}), "train")
    assert data.pictures[0].boxes.tolist() == [[0, 0, 20, 16]]  # the whole image
    image, target = data[0]
    assert image.shape == (3, 16, 20) and target["boxes"].dtype == torch.float32


def test_voc_without_a_size_takes_that_of_the_image(tmp_path):
    folder = voc(tmp_path / "v", {"x": [voc_object()]}, tagged=False)
    picture = read_voc(folder, "train").pictures[0]
    assert (picture.width, picture.height) == (20, 16)
    (folder / "JPEGImages/x.png").write_bytes(b"no image")
    told = refusal(read_voc, folder, "train")
    assert "x.xml: x.png" in told and told.lower().count("mend or remove it") == 1


def test_difficult_boxes_and_crowds_are_ignored(tmp_path):
    objects = [voc_object(), voc_object(more="<difficult>1</difficult>")]
    data = read_voc(voc(tmp_path / "v", {"x": objects}), "train")
    assert data.pictures[0].ignored.tolist() == [False, True] and data.n_boxes == 1
    marks = as_coco(canvases(1, size=32))["annotations"]
    marks[0]["iscrowd"] = 1
    file = coco(tmp_path / "c", data=canvases(1, size=32), annotations=marks)
    assert read_coco(file, tmp_path / "c/train").pictures[0].ignored.tolist()[0] is True
    batch = detection._Mirrored(data, False)[(0, False)]
    assert len(batch[1]["boxes"]) == 1  # not trained on either


def test_an_image_without_boxes_is_an_image(tmp_path):
    data = read_voc(voc(tmp_path / "v", {"x": [], "y": [voc_object()]}), "train")
    assert data[0][1]["boxes"].shape == (0, 4) and data.n_boxes == 1
    assert "masks" not in data[0][1] and not data.has_masks
    file = coco(tmp_path / "c", annotations=[])
    again = read_coco(file, tmp_path / "c/train")
    assert len(again) == 3 and again[0][1]["masks"].shape == (0, 32, 32)


def test_both_layouts_and_the_built_in_set_answer_alike(tmp_path):
    file = coco(tmp_path / "c")
    drawn = canvases(3, size=32)
    again = read_coco(file, tmp_path / "c/train")
    assert as_coco(again) == as_coco(drawn) and again.has_masks
    for (image, target), (same, wanted) in zip(again, drawn, strict=True):
        assert torch.equal(image, same)
        assert all(torch.equal(target[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    "layout",
    [
        ("annotations/instances_{}.json", "{}"),
        ("annotations/{}.json", "images/{}"),
        ("{}/_annotations.coco.json", "{}"),
        ("{}.json", "images"),
        ("{}.json", "."),
    ],
    ids=lambda o: o[0] + " " + o[1],
)
def test_layouts_of_coco_are_found(tmp_path, layout):
    data = canvases(2, size=32)
    for split in ("train", "val"):
        file, images = (tmp_path / part.format(split) for part in layout)
        for folder in (file.parent, images):
            folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(as_coco(data)))
        for picture in data.pictures:
            (images / f"{picture.id}.png").write_bytes(picture.item["bytes"])
    assert {"train", "val"} == set(box_splits(tmp_path))
    assert len(load_detections(str(tmp_path), "val")) == 2


def test_lvis_names_images_by_address_and_classes_by_frequency(tmp_path):
    data = canvases(2, size=32)
    content = as_coco(data)
    for image in content["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/train2017/{image.pop('file_name')}"
    for category, group in zip(content["categories"], "rcf", strict=True):
        category["frequency"] = group
    (tmp_path / "train2017").mkdir()
    for picture in data.pictures:
        (tmp_path / f"train2017/{picture.id}.png").write_bytes(picture.item["bytes"])
    (tmp_path / "lvis_v1_train.json").write_text(json.dumps(content))
    read = load_detections(str(tmp_path), "train")
    assert read.groups == ["r", "c", "f"] and as_coco(read)["categories"] == content["categories"]


def test_numbers_of_categories_are_those_of_the_file(tmp_path):
    data = canvases(3, size=32)
    content = as_coco(data)
    for entry in content["categories"]:
        entry["id"] *= 7
    for entry in content["annotations"]:
        entry["category_id"] *= 7
    file = coco(tmp_path / "c", **content)
    read = read_coco(file, tmp_path / "c/train", ["cross", "disc", "ring", "new", "newer"])
    assert read.categories == [21, 7, 14, 22, 23]
    for picture, drawn in zip(read.pictures, data.pictures, strict=True):
        names = [read.classes[label] for label in picture.labels]
        assert names == [data.classes[label] for label in drawn.labels]


# What is refused


BAD_VOC = {
    "image is missing": ("JPEGImages has no image 'x', which train.txt names", None),
    "xml is missing": ("Annotations has no x.xml, which train.txt names", None),
    "xml is cut": ("x.xml: it cannot be read", "<annotation><object>"),
    "empty": ("x.xml: it cannot be read", ""),
    "entities": ("x.xml: it declares a document type", "<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>"),
    "no name": ("x.xml, object 1: it has no name", voc_object("")),
    "no box": ("x.xml, object 1: xmin is ''", "<object><name>a</name></object>"),
    "nan": ("x.xml, object 1: xmin is 'nan'", voc_object(box=("nan", 2, 3, 4))),
    "words": ("x.xml, object 1: ymax is 'many'", voc_object(box=(1, 2, 3, "many"))),
    "infinite": ("x.xml, object 1: xmax is '1e999'", voc_object(box=(1, 2, "1e999", 4))),
    "other root": ("x.xml: it begins with <html>, not with <annotation>", "<html></html>"),
    "difficult": (
        "x.xml, object 1: difficult is 'yes', but must be 0 or 1",
        voc_object(more="<difficult>yes</difficult>"),
    ),
    "long": ("x.xml, object 1: xmin is 'aaaa", voc_object(box=("a" * 5000, 2, 3, 4))),
    "coding": ("x.xml: it cannot be read (unknown", "<?xml version='1.0' encoding='zz'?><a/>"),
    "deep": ("x.xml: it begins with <a>", "<a>" * 50000 + "</a>" * 50000),
}


@pytest.mark.parametrize("case", BAD_VOC)
def test_a_mistake_in_vocs_files_is_one_sentence(tmp_path, case):
    said, text = BAD_VOC[case]
    folder = voc(tmp_path / "set", {"x": [voc_object()], "y": [voc_object()]})
    if case == "image is missing":
        (folder / "JPEGImages/x.png").unlink()
    elif case == "xml is missing":
        (folder / "Annotations/x.xml").unlink()
    elif text.startswith("<object"):
        (folder / "Annotations/x.xml").write_text(f"<annotation>{text}</annotation>")
    else:
        (folder / "Annotations/x.xml").write_text(text)
    told = refusal(read_voc, folder, "train")
    assert told.startswith("set (split train) cannot be used: ") and said in told
    assert len(told) < 300


def cuts(text, n=12):
    "The first part of a text, up to `n` different places"
    return [text[: i * (len(text) - 1) // n] for i in range(n + 1)]


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path):
    folder = voc(tmp_path / "v", {"x": [voc_object()]})
    file = folder / "Annotations/x.xml"
    for text in cuts(file.read_text()):
        file.write_text(text)
        assert "x.xml: it cannot be read" in refusal(read_voc, folder, "train")
    file = coco(tmp_path / "c")
    for text in cuts(file.read_text()):
        file.write_text(text)
        assert "instances_train.json cannot be read" in refusal(read_coco, file, tmp_path / "c")


def test_a_split_or_a_layout_that_is_missing_is_named(tmp_path):
    folder = voc(tmp_path / "v", {"x": [voc_object()]})
    assert "Did you mean 'train'?" in refusal(load_detections, str(folder), "trian")
    (tmp_path / "empty").mkdir()
    said = "empty' must be a folder with ImageSets/Main"
    assert said in refusal(load_detections, str(tmp_path / "empty"), "train")
    names = folder / "ImageSets/Main/train.txt"
    for text, said in ((b"x\nx\n", "train.txt names x twice"), (b"\xff\xfe", "cannot be read")):
        names.write_bytes(text)
        assert said in refusal(read_voc, folder, "train")
    names.write_bytes(b"")
    asked = TINY | dict(dataset=str(folder), evaluate_on="train", out=str(tmp_path / "r"))
    assert "v (split train) has no boxes" in refusal(transfer, **asked | dict(n_images=0))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("coding", ["utf-8", "utf-16"])
def test_no_entity_is_expanded_in_any_coding(tmp_path, coding):
    folder = voc(tmp_path / "set", {"x": [voc_object()]})
    bomb = "<!DOCTYPE a [<!ENTITY a 'aaaaaaaaaa'><!ENTITY b '&a;&a;&a;&a;'>]><a>&b;</a>"
    text = f"<?xml version='1.0' encoding='{coding}'?>{bomb}"
    (folder / "Annotations/x.xml").write_bytes(text.encode(coding))
    assert "declares a document type" in refusal(read_voc, folder, "train")


def test_all_mistakes_of_a_set_come_together(tmp_path):
    images = {name: [voc_object(name)] for name in "abcdef"}
    folder = voc(tmp_path / "set", images)
    told = refusal(read_voc, folder, "train", ["a"])
    assert told.count("is of class") == 3 and "; and 2 more. Mend or remove them." in told


def test_an_unknown_class_is_named_with_the_nearest(tmp_path):
    folder = voc(tmp_path / "set", {"x": [voc_object("RCB")]})
    told = refusal(read_voc, folder, "train", ["RBC", "WBC"])
    assert "x.xml, object 1 is of class 'RCB', which is not RBC, WBC (Did you mean 'RBC'?)" in told
    file = coco(tmp_path / "c")
    assert "Did you mean 'crosses'?" in refusal(
        read_coco, file, tmp_path / "c/train", ["disc", "ring", "crosses"]
    )


def test_boxes_outside_are_cut_and_told_by_name(tmp_path, capsys):
    odd = {
        "w": [voc_object(box=(-5, 3, 10, 12))],
        "x": [voc_object(box=(2, 3, 21, 17))],  # by one pixel: in silence
        "y": [voc_object(box=(30, 3, 40, 12)), voc_object()],
        "z": [voc_object(box=(5, 9, 5, 12)), voc_object(box=(9, 9, 5, 12)), voc_object()],
    }
    data = read_voc(voc(tmp_path / "set", odd), "train")
    assert [len(picture.boxes) for picture in data.pictures] == [1, 1, 1, 1]
    assert data.pictures[0].boxes.tolist() == [[0, 2, 10, 12]]
    assert data.pictures[1].boxes.tolist() == [[1, 2, 20, 16]]
    told = capsys.readouterr().out.splitlines()
    assert told == [
        "set (split train): 2 boxes without area left out (z.xml, object 1, z.xml, object 2)",
        "set (split train): 2 boxes cut at the edge of the image, or left out beyond it "
        "(w.xml, object 1, y.xml, object 1)",
    ]


BAD_COCO = {
    "no list": (dict(images=None), "must have a list 'images'"),
    "no entries": (dict(categories=[1]), "must have a list 'categories'"),
    "no id": (dict(images=[dict(file_name="1.png")]), "image 1 has no id and file_name"),
    "id is text": (dict(images=[dict(id="1", file_name="1.png")]), "image 1 has no id"),
    "no size": (dict(images=[dict(id=1, file_name="1.png")]), "(1.png) has no width and height"),
    "category twice": (dict(categories=[dict(id=1, name="a"), dict(id=1, name="b")]), "category 2"),
    "null byte": (
        dict(images=[dict(id=1, file_name="1\0.png", width=32, height=32)]),
        "there is no file",
    ),
    "long name": (
        dict(images=[dict(id=1, file_name="a" * 5000, width=32, height=32)]),
        "there is no file 'aaaa",
    ),
    "no categories": (dict(categories=None), "must have a list 'categories'"),
    "no annotations": (dict(annotations=None), "must have a list 'annotations'"),
    "id twice": (
        dict(images=[dict(id=1, file_name=f"{i}.png", width=32, height=32) for i in (1, 2)]),
        "has two images of id 1",
    ),
    "file twice": (
        dict(images=[dict(id=i, file_name="1.png", width=32, height=32) for i in (1, 2)]),
        "names 1.png twice",
    ),
}
BAD_MARKS = {
    "other image": (dict(image_id=77), "is of an image that the file lacks"),
    "image is a list": (dict(image_id=[1]), "is of an image that the file lacks"),
    "other category": (dict(category_id=77), "has category_id 77, which the file lacks"),
    "three numbers": (dict(bbox=[1, 2, 3]), "has bbox [1, 2, 3], but must have four numbers"),
    "text": (dict(bbox=[1, 2, 3, "4"]), "but must have four numbers"),
    "truth": (dict(bbox=[1, 2, 3, True]), "but must have four numbers"),
    "no box": (dict(bbox=None), "has bbox None, but must have four numbers"),
    "crowd": (dict(iscrowd="yes"), "has iscrowd 'yes', but must have 0 or 1"),
    "mask of text": (dict(segmentation="abc"), "neither polygons nor runs"),
    "no runs": (dict(segmentation=dict(size=[32, 32])), "neither polygons nor runs"),
    "odd polygon": (dict(segmentation=[[1, 2, 3, 4, 5]]), "neither polygons nor runs"),
    "runs of another size": (
        dict(segmentation=dict(size=[9, 9], counts=[81])),
        "neither polygons nor runs",
    ),
    "runs too short": (
        dict(segmentation=dict(size=[32, 32], counts=[8])),
        "neither polygons nor runs",
    ),
}


@pytest.mark.parametrize("case", [*BAD_COCO, *BAD_MARKS])
def test_a_mistake_in_cocos_file_is_one_sentence(tmp_path, case):
    if case in BAD_COCO:
        changes, said = BAD_COCO[case]
    else:
        change, said = BAD_MARKS[case]
        marks = as_coco(canvases(3, size=32))["annotations"]
        changes = dict(annotations=[marks[0] | change, *marks[1:]])
    file = coco(tmp_path / "c", **changes)
    told = refusal(read_coco, file, tmp_path / "c/train")
    assert said in told and "instances_train.json" in told and len(told) < 500


def test_boxes_of_coco_without_area_are_left_out_and_told(tmp_path, capsys):
    marks = as_coco(canvases(3, size=32))["annotations"]
    for i, box in enumerate(([5, 5, -3, 4], [5, 5, 0, 4], [5, 5, 3, -1])):
        marks[i]["bbox"] = box
    data = read_coco(coco(tmp_path / "c", annotations=marks), tmp_path / "c/train")
    assert data.n_boxes == len(marks) - 3
    assert "3 boxes without area left out (instances_train.json, anno" in capsys.readouterr().out


def test_a_frequency_that_is_none_is_no_group(tmp_path):
    categories = as_coco(canvases(3, size=32))["categories"]
    for entry, frequency in zip(categories, (["r"], "often", "f"), strict=True):
        entry["frequency"] = frequency
    data = read_coco(coco(tmp_path / "c", categories=categories), tmp_path / "c/train")
    assert data.groups == ["", "", "f"]


def test_a_missing_image_of_coco_is_named(tmp_path):
    file = coco(tmp_path / "c")
    (tmp_path / "c/train/2.png").unlink()
    told = refusal(load_detections, str(tmp_path / "c"), "train")
    assert "instances_train.json, image 2: there is no file '2.png'" in told
    for text, said in (("{", "cannot be read"), ("[]", "must have a list"), ("NaN", "no number")):
        file.write_text(text)
        assert said in refusal(read_coco, file, tmp_path / "c/train")


def test_a_damaged_mask_is_one_sentence(tmp_path):
    marks = as_coco(canvases(3, size=32))["annotations"]
    marks[0]["segmentation"] = dict(size=[32, 32], counts="zz")
    data = read_coco(coco(tmp_path / "c", annotations=marks), tmp_path / "c/train")
    assert "a mask of image 0 of instances_train.json cannot be" in refusal(data.__getitem__, 0)
    asked = TINY | dict(dataset=str(tmp_path / "c"), evaluate_on="train", out=str(tmp_path / "r"))
    told = refusal(transfer, **asked | dict(n_images=0))  # before it trains
    assert "c (split train) cannot be used: a mask of image 0 (1.png) cannot be decoded" in told
    assert not (tmp_path / "r").exists()


def damaged(folder):
    "Sets whose images cannot be used, and what is said of each"
    voc(folder / "cut", {"x": [voc_object()], "y": [voc_object()]})
    file = folder / "cut/JPEGImages/y.png"
    file.write_bytes(file.read_bytes()[:20])
    voc(folder / "other", {"x": [voc_object()], "y": [voc_object()]})
    file = folder / "other/Annotations/y.xml"
    file.write_text(file.read_text().replace("<width>20", "<width>21"))
    voc(folder / "none", {"x": [], "y": []})
    return {
        "cut": "y.png",
        "other": "(y.png) is 20 x 16 pixels, but its annotation says 21 x 16",
        "none": "none (split train) has no boxes",
    }


@pytest.mark.parametrize("case", ["cut", "other", "none"])
def test_images_are_looked_at_before_a_run(tmp_path, case):
    said = damaged(tmp_path)[case]
    asked = TINY | dict(dataset=str(tmp_path / case), evaluate_on="train", out=str(tmp_path / "r"))
    told = refusal(transfer, **asked | dict(n_images=2))
    assert said in told and told.lower().count("mend or remove it") <= 1
    assert not (tmp_path / "r").exists()
    if case == "other":  # a large set is looked at in part: the rest when it is decoded
        assert said in refusal(read_voc(tmp_path / "other", "train").__getitem__, 1)


def test_a_class_of_the_measured_split_alone_is_refused(tmp_path):
    folder = voc(tmp_path / "set", {"x": [voc_object("cat")], "y": [voc_object("cat")]})
    voc(folder, {"z": [voc_object("cta")]}, "val")
    asked = TINY | dict(dataset=str(folder), n_images=0, out=str(tmp_path / "r"))
    told = refusal(transfer, **asked)
    assert "set (split val) cannot be used: z.xml, object 1 is of class 'cta', which is not" in told


def test_an_image_is_not_trained_on_and_measured_on(tmp_path):
    images = {"x": [voc_object()], "y": [voc_object()]}
    folder = voc(tmp_path / "set", images, "trainval")
    (folder / "ImageSets/Main/val.txt").write_text("y\n")
    asked = TINY | dict(dataset=str(folder), split="trainval", out=str(tmp_path / "r"))
    told = refusal(transfer, **asked | dict(n_images=1))  # of the whole split, not of its part
    assert "set (split val) shares 1 of its images with set (split trainval) (y.png)" in told


REFUSED = {
    "detector": (dict(detector="fnp"), "Did you mean 'fpn'?"),
    "norm": (dict(norm="frozne"), "Did you mean 'frozen'?"),
    "frozen at random": (dict(norm="frozen"), "a random encoder has no statistics to keep"),
    "warm-up": (dict(warmup_epochs=2), "warmup_epochs is 2, but must be below epochs, 2."),
    "two starts": (dict(checkpoint="a.safetensors", weights="b"), "checkpoint and weights are"),
    "no checkpoint": (dict(checkpoint="a.safetensors"), "it is missing, or no file"),
    "encoder": (dict(encoder="smal"), "Did you mean 'small'?"),
    "no stages": (dict(encoder="mobilenet_v3_small"), "has no stages that give maps"),
    "weights of another": (dict(encoder="resnet18", weights="IMAGENET"), "must be a file, or one"),
    "split": (dict(split="trian"), "Did you mean 'train'?"),
    "evaluate_on": (dict(evaluate_on="vla"), "Did you mean 'val'?"),
    "dataset": (dict(dataset="shape"), "Did you mean 'shapes'?"),
    "classes": (dict(classes="disc+disc"), "names joined by +, each once"),
    "batch": (dict(batch_size=5), "batch_size is 5, but must be at most 4, the"),
    "too many": (dict(n_images=65), "n_images is 65, but the set has 64 images"),
    "size": (dict(size=8), "size is 8, but must be from 32 to 4096"),
    "type": (dict(masks="true"), "masks is 'true', but must be True or False"),
    "diverged": (dict(lr=1e6), "training diverged. Lower lr (now 1000000.0)"),
    "name": (dict(name="a/b"), "must be a file name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_parameter_is_refused_and_leaves_nothing(tmp_path, case):
    wrong, said = REFUSED[case]
    asked = TINY | dict(out=str(tmp_path)) | wrong
    assert said in refusal(transfer, **asked)
    assert not list(tmp_path.iterdir())


def test_gradients_that_are_off_are_refused(tmp_path):
    with torch.no_grad():
        assert "gradients are turned off" in refusal(transfer, **TINY, out=str(tmp_path))


# Detectors


def test_the_pyramid_is_torchvisions():
    net = Encoder("resnet18", stem="imagenet").backbone
    ours = build_detector(net, 3, norm="frozen", size=800).eval()
    theirs = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5).eval()
    theirs.load_state_dict(ours.backbone.state_dict())
    x = torch.randn(1, 3, 96, 128)
    made = ours.backbone(x)
    for name, wanted in theirs(x).items():
        torch.testing.assert_close(made[name], wanted, rtol=1e-4, atol=1e-4)
    sizes = [round(size) for sizes in ours.rpn.anchor_generator.sizes for size in sizes]
    assert sizes == [32, 64, 128, 256, 512]
    half = build_detector(Encoder().backbone, 3, "c4", size=400).rpn.anchor_generator.sizes
    assert [round(size) for size in half[0]] == [16, 32, 64, 128, 256]  # scaled with the images


@pytest.mark.parametrize("kind", ["fpn", "c4"])
@pytest.mark.parametrize("name", ["small", "resnet18", "timm/resnet18"])
def test_every_weight_of_the_encoder_is_in_the_detector(kind, name):
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    net = Encoder(name, bn_splits=1).backbone
    model = build_detector(net, 2, kind, True)
    inside = {id(p) for p in model.parameters()}
    assert {id(p) for p in net.parameters()} <= inside


def norms_in(module):
    return sum(isinstance(layer, torch.nn.BatchNorm2d) for layer in module.modules())


def test_new_layers_are_normalised_where_norms_are_trained():
    for norm, pyramid, head in (("trained", 4, 4), ("frozen", 0, 0)):
        model = build_detector(Encoder().backbone, 3, "fpn", norm=norm)
        assert norms_in(model.backbone.fpn) == pyramid
        model = build_detector(Encoder().backbone, 3, "c4", norm=norm)
        assert norms_in(model.roi_heads.box_head) == head  # one of them follows the last stage


def test_looking_at_maps_leaves_no_trace():
    net = Encoder("resnet18").backbone
    net.layer1.eval()
    modes = [module.training for module in net.modules()]
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    assert detection.map_shapes(net) == [(64, 1), (128, 2), (256, 4), (512, 8)]
    assert [module.training for module in net.modules()] == modes
    assert not any(module._forward_hooks for module in net.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_statistics_of_parts_become_plain_again():
    net = Encoder(bn_splits=4).backbone
    model = build_detector(net, 2)
    assert not [m for m in model.modules() if type(m).__name__ == "SplitBN"]


def test_frozen_statistics_stay(tmp_path):
    first = pretrained(tmp_path)
    p = record.defaults(transfer) | dict(checkpoint=first)
    for norm, moved in (("frozen", False), ("trained", True)):
        encoder, _ = start_encoder(p)
        model = build_detector(encoder.backbone, 3, norm=norm, size=64, rois=16)
        before = {k: v.clone() for k, v in model.backbone.named_buffers() if "running" in k}
        batches = detection.detection_batches(canvases(4, size=64), p | TINY | dict(masks=False))
        detection.train_detector(model, batches, p | TINY | dict(precision="fp32"))
        after = dict(model.backbone.named_buffers())
        assert before and any((after[k] != v).any() for k, v in before.items()) == moved


def pretrained(folder):
    "A checkpoint of a small encoder, trained for a moment"
    asked = dict(epochs=1, n_images=128, batch_size=64, queue_size=128, readouts="none")
    pretrain(**asked, out=str(folder), name="first", progress=False, workers=0)
    return str(folder / "first.safetensors")


def test_a_transfer_starts_from_its_checkpoint(tmp_path):
    first = pretrained(tmp_path)
    p = record.defaults(transfer) | dict(checkpoint=first)
    encoder, run = start_encoder(p)
    tensors, _ = read_checkpoint(first)
    for name, tensor in encoder.backbone.state_dict().items():
        assert torch.equal(tensor, tensors[f"method.encoder.backbone.{name}"])
    made = transfer(**TINY, checkpoint=first, out=str(tmp_path), name="t")
    assert made["pretrained"]["epochs"] == 1 == run["epochs"]
    assert made["weights_sha256"] == record.content_hash(first)
    told = refusal(transfer, **TINY, checkpoint=first, encoder="resnet18", out=str(tmp_path))
    assert "first.safetensors is of another architecture than encoder 'resnet18'" in told
    assert "it has 0.weight (32, 3, 3, 3), 1.weight (32,)" in told
    assert "has conv1.weight (64, 3, 3, 3), bn1.weight (64,)" in told
    again = transfer(**TINY, checkpoint=first, encoder="small", out=str(tmp_path), name="named")
    assert again["metrics"] == made["metrics"]


def test_two_encoders_of_one_seed_are_paired(tmp_path):
    "New layers are the same, whatever the encoder's weights were"
    p = record.defaults(transfer) | dict(seed=3)
    heads = []
    for checkpoint in ("", pretrained(tmp_path)):
        encoder, _ = start_encoder(p | dict(checkpoint=checkpoint))
        torch.manual_seed(len(checkpoint))  # what came before decides nothing
        model = detection._detector_of(p, encoder.backbone, 3, torch.device("cpu"))
        heads.append([model.backbone.fpn, model.rpn, model.roi_heads])
    for a, b in zip(*heads, strict=True):
        for name, tensor in a.state_dict().items():
            assert torch.equal(tensor, b.state_dict()[name]), name


def test_workers_bring_the_same_batches():
    data = canvases(5, size=32)
    p = dict(epochs=2, batch_size=2, seed=1, masks=True, workers=0)
    for a, b in zip(
        detection.detection_batches(data, p),
        detection.detection_batches(data, p | dict(workers=2)),
        strict=True,
    ):
        for (image, target), (same, wanted) in zip(a, b, strict=True):
            assert torch.equal(image, same)
            assert all(torch.equal(target[key], wanted[key]) for key in wanted)


def test_a_mirrored_image_has_its_boxes_and_masks_mirrored():
    data = canvases(1, size=64)
    image, target = data[0]
    mirrored, wanted = detection._Mirrored(data, True)[(0, True)]
    assert torch.equal(mirrored, image.flip(2))
    assert torch.equal(wanted["masks"], target["masks"].flip(2))
    left, top, right, bottom = target["boxes"].T
    assert torch.equal(wanted["boxes"], torch.stack([64 - right, top, 64 - left, bottom], 1))


class Drawing(torch.nn.Module):
    "Stands for a detector: draws `n` random numbers in a step"

    def __init__(self, n):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.n = n

    def forward(self, images, targets):
        return dict(loss_drawn=self.weight * torch.rand(self.n)[0])


def test_what_a_step_draws_does_not_depend_on_earlier_steps():
    p = dict(epochs=3, batch_size=2, seed=5, masks=False, workers=0, lr=0.0, weight_decay=0.0)
    p |= dict(warmup_epochs=0, precision="fp32", name="x", progress=False)
    batches = detection.detection_batches(canvases(2, size=32), p)
    losses = [detection.train_detector(Drawing(n), batches, p)["loss"].tolist() for n in (1, 7)]
    assert losses[0] == losses[1] and len(set(losses[0])) == 3


def test_mirrors_and_order_differ_between_epochs_and_seeds():
    data = canvases(8, size=32)
    seen = []
    for seed in (0, 1):
        p = dict(epochs=2, batch_size=8, seed=seed, masks=False, workers=0)
        for batch in detection.detection_batches(data, p):
            seen.append([float(image[0, :, 0].sum()) for image, _ in batch])
    assert len({tuple(columns) for columns in seen}) == 4
    assert len({tuple(sorted(columns)) for columns in seen}) > 1  # mirrors, not order alone


# Predictions and their measure


def found_at_random(data, seed, moved=3.0, extra=3):
    "Predictions near the marked boxes, and some anywhere"
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for picture in data.pictures:
        n = len(picture.boxes)
        boxes = picture.boxes + moved * torch.randn(n, 4, generator=generator)
        side = min(picture.width, picture.height)
        more = side * torch.rand(extra, 4, generator=generator).double().sort(1).values
        labels = torch.randint(len(data.classes), (n + extra,), generator=generator)
        right = torch.rand(n, generator=generator) < 0.8
        labels[:n] = torch.where(right, picture.labels, labels[:n])
        masks = detection.pixel_masks(picture.segments, picture.height, picture.width)
        masks = torch.cat([masks.roll(1, 1), torch.zeros(extra, *masks.shape[1:])])
        scores = torch.rand(n + extra, generator=generator).round(decimals=1)  # with ties
        found = dict(
            boxes=torch.cat([boxes, more]), labels=labels + 1, scores=scores, masks=masks[:, None]
        )
        rows += detection._rows(data, picture, found)
    return rows


def by_pycocotools(data, path, kind, class_id=None):
    "AP, AP50, AP75 in percent, from files"
    file = Path(path).with_name("truth.json")
    file.write_text(json.dumps(as_coco(data) | dict(info={})))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(file)
        measured = COCOeval(truth, truth.loadRes(str(path)), kind)
        if class_id:
            measured.params.catIds = [class_id]
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    return 100 * measured.stats[:3]


def with_crowds(data):
    "A set in which every fifth mark is a crowd"
    pictures = []
    for picture in data.pictures:
        crowds = torch.arange(len(picture.labels)) % 5 == 4
        pictures.append(picture._replace(ignored=crowds))
    return Detections(data.what, pictures, data.classes, [4, 9, 2], data.groups)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("crowds", [False, True])
def test_ap_is_that_of_pycocotools(tmp_path, seed, crowds):
    data = canvases(10 + 4 * seed, seed=seed, size=96)
    data = with_crowds(data) if crowds else data
    rows = found_at_random(data, seed, extra=120 if seed == 5 else 3)  # more than 100 an image
    path = tmp_path / "found.coco"
    write_predictions(rows, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = average_precision(data, read_predictions(path, data), masks=True)
    for kind, before in (("bbox", ""), ("segm", "mask ")):
        values = [ours[before + name] for name in ("AP", "AP50", "AP75")]
        assert values == pytest.approx(by_pycocotools(data, path, kind), abs=1e-6)
        for name, number in zip(data.classes, data.categories, strict=True):
            theirs = by_pycocotools(data, path, kind, number)[0]
            assert ours[f"{before}AP {name}"] == pytest.approx(theirs, abs=1e-6)
    assert 0.1 < ours["AP"] < 95  # a case that could differ


def test_thresholds_in_float32_would_differ():
    "The reason why they are given"
    data = canvases(12, seed=8)
    rows = found_at_random(data, 8)
    given = average_precision(data, rows)
    kept = (detection.IOU_THRESHOLDS, detection.RECALLS)
    try:
        detection.RECALLS = torch.linspace(0, 1, 101).tolist()
        wrong = average_precision(data, rows)
    finally:
        detection.IOU_THRESHOLDS, detection.RECALLS = kept
    assert any(abs(given[name] - wrong[name]) > 1e-3 for name in given)


def test_an_iou_that_is_a_threshold_reaches_it():
    "0.55 as float32 is a little above 0.55"
    picture = canvases(1, size=64).pictures[0]
    box = torch.tensor([[0, 0, 20, 10]]).double()
    picture = picture._replace(boxes=box, labels=torch.tensor([0]), ignored=torch.tensor([False]))
    data = Detections("one", [picture._replace(segments=None)], ["a"], [1])
    rows = [dict(image_id=picture.id, category_id=1, bbox=[0, 0, 11, 10], score=0.9)]
    assert average_precision(data, rows)["AP"] == pytest.approx(20)  # two of ten thresholds


def test_ap_at_its_ends():
    data = canvases(6, size=64)
    exact = []
    for picture in data.pictures:
        found = dict(boxes=picture.boxes, labels=picture.labels + 1)
        exact += detection._rows(data, picture, found | dict(scores=torch.ones(99)))
    assert set(average_precision(data, exact).values()) == {100.0}
    assert set(average_precision(data, []).values()) == {0.0}
    wrong = [row | dict(category_id=row["category_id"] % 3 + 1) for row in exact]
    assert average_precision(data, wrong)["AP50"] < 1
    assert "has no boxes" in refusal(average_precision, canvases(0), [])


def test_groups_of_frequency_are_means_over_their_classes():
    data = canvases(20, seed=2, size=64)
    rows = found_at_random(data, 2)
    grouped = Detections(data.what, data.pictures, data.classes, data.categories, ["r", "c", "c"])
    ours = average_precision(grouped, rows)
    assert ours["APr"] == ours["AP disc"]
    assert ours["APc"] == pytest.approx((ours["AP ring"] + ours["AP cross"]) / 2)
    assert "APf" not in ours and "APr" not in average_precision(data, rows)


def test_a_class_without_boxes_is_left_out():
    picture = canvases(1, size=64).pictures[0]
    data = Detections("one", [picture._replace(labels=0 * picture.labels)], ["a", "b"], [1, 2])
    rows = [dict(image_id=1, category_id=2, bbox=[1, 2, 3, 4], score=0.9)]
    assert set(average_precision(data, rows)) == {"AP", "AP50", "AP75", "AP a"}


def test_predictions_come_back_from_their_file(tmp_path):
    data = canvases(4, size=64)
    torch.manual_seed(0)
    model = build_detector(Encoder().backbone, 3, "c4", True, size=64)
    model.roi_heads.score_thresh = 0.0  # random weights are sure of nothing
    rows = predict(model, data)
    assert len(rows) > 50 and {"segmentation"} <= set(rows[0])
    with torch.no_grad():
        first = model([data[0][0] / 255])[0]
    wanted = torchvision.ops.box_convert(first["boxes"].double(), "xyxy", "xywh").tolist()
    kept = [row["bbox"] for row in rows if row["image_id"] == data.pictures[0].id]
    for box, same in zip(wanted, kept, strict=True):
        assert same == pytest.approx(box, abs=1e-3)
    write_predictions(rows, tmp_path / "found.coco")
    assert read_predictions(tmp_path / "found.coco", data) == rows
    with contextlib.redirect_stdout(io.StringIO()):
        (tmp_path / "truth.json").write_text(json.dumps(as_coco(data) | dict(info={})))
        theirs = COCO(tmp_path / "truth.json").loadRes(str(tmp_path / "found.coco"))
    assert [o["bbox"] for o in theirs.dataset["annotations"]] == [row["bbox"] for row in rows]
    boxes = np.array([row["bbox"] for row in rows])
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= 64.001).all()


BAD_ROWS = {
    "no list": ({}, "must hold a list"),
    "no entry": ([3], "box 1 is no entry"),
    "image": ([dict(image_id=9)], "box 1 is of image 9"),
    "category": ([dict(image_id=1, category_id=9)], "box 1 is of category 9"),
    "box": ([dict(image_id=1, category_id=1, bbox=[1, 2, 3])], "box 1 has bbox [1, 2, 3]"),
    "score": ([dict(image_id=1, category_id=1, bbox=[1, 2, 3, 4])], "box 1 has score None"),
    "mask": (
        [dict(image_id=1, category_id=1, bbox=[1, 2, 3, 4], score=1, segmentation=[])],
        "box 1 has a segmentation",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_foreign_file_of_predictions_is_refused(tmp_path, case):
    rows, said = BAD_ROWS[case]
    write_predictions(rows, tmp_path / "found.coco")
    assert said in refusal(read_predictions, tmp_path / "found.coco", canvases(1, size=32))


# Whole transfers


def test_four_canvases_are_learnt_by_heart(tmp_path):
    asked = dict(size=96, n_images=4, evaluate_on="train", epochs=90, rois=64)
    made = transfer(
        **asked, lr=0.05, warmup_epochs=10, out=str(tmp_path), name="heart", progress=False
    )
    assert made["metrics"]["AP50"] > 80
    assert made["measured_on"] == "the images trained on"
    assert made["epochs"][-1]["loss"] < 0.4 * made["epochs"][0]["loss"]


def test_masks_are_learnt_by_heart(tmp_path):
    asked = dict(size=96, n_images=2, evaluate_on="train", epochs=90, rois=32)
    made = transfer(
        **asked,
        detector="c4",
        masks=True,
        lr=0.05,
        warmup_epochs=10,
        out=str(tmp_path),
        name="heart",
        progress=False,
    )
    assert made["metrics"]["AP50"] > 80 and made["metrics"]["mask AP50"] > 80


@needs_bccd
def test_four_images_of_bccd_are_learnt_by_heart(tmp_path):
    asked = dict(dataset=str(BCCD), size=160, n_images=4, evaluate_on="train", epochs=80)
    made = transfer(
        **asked,
        lr=0.05,
        warmup_epochs=10,
        out=str(tmp_path),
        name="heart",
        progress=False,
    )
    assert made["metrics"]["AP50"] > 80
    data = load_detections(str(BCCD), "train").take(shuffled(205)[:4])
    path = tmp_path / "heart.coco"
    assert average_precision(data, read_predictions(path, data)) == made["metrics"]
    values = [made["metrics"][name] for name in ("AP", "AP50", "AP75")]
    assert values == pytest.approx(by_pycocotools(data, path, "bbox"), abs=1e-6)


def test_the_seed_decides_everything(tmp_path):
    runs = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(runs))
        runs.append(transfer(**TINY, seed=seed, out=str(tmp_path / folder)))
        state = torch.random.get_rng_state()
        torch.manual_seed(len(runs) - 1)
        assert torch.equal(torch.random.get_rng_state(), state)  # the caller's numbers stay
    files = [(tmp_path / folder / "transfer.coco").read_bytes() for folder in "abc"]
    tables = [detection.pd.read_parquet(tmp_path / folder / "transfer.parquet") for folder in "abc"]
    assert files[0] == files[1] != files[2]
    assert tables[0].equals(tables[1]) and not tables[0].equals(tables[2])


def test_a_record_is_whole_and_is_not_overwritten(tmp_path):
    made = transfer(**TINY, out=str(tmp_path), name="one")
    assert record.read_record(tmp_path / "one.json") == made
    assert {"AP", "AP50", "AP75"} <= set(made["metrics"])
    losses = detection.pd.read_parquet(tmp_path / "one.parquet")["loss"]
    assert made["steps"] == 4 == len(losses)
    assert [row["loss"] for row in made["epochs"]] == pytest.approx(
        [losses[:2].mean(), losses[2:].mean()]
    )
    assert (made["n_train"], made["n_test"], made["measured_on"]) == (4, 32, "val split")
    assert made["parameters"]["precision"] in ("bf16", "fp32") and made["pretrained"] == {}
    for key in ("seconds", "device", "git_revision", "versions", "boxes_test", "marks_sha256"):
        assert key in made
    told = refusal(transfer, **TINY | dict(rois=17), out=str(tmp_path), name="one")
    assert "holds the record of a run with rois=16, not 17" in told
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.coco", "one.json", "one.parquet"]
    again = transfer(**TINY, out=str(tmp_path), name="one")
    assert again["metrics"] == made["metrics"]


def test_precisions_agree_about_the_first_loss(tmp_path):
    if native_precision() != "bf16":
        pytest.skip("this processor only imitates bfloat16")
    losses = []
    for precision in ("bf16", "fp32"):
        transfer(**TINY, precision=precision, out=str(tmp_path), name=precision)
        losses.append(detection.pd.read_parquet(tmp_path / f"{precision}.parquet")["loss"][0])
    assert losses[0] == pytest.approx(losses[1], rel=0.1) and losses[0] != losses[1]


# Many seeds


def test_the_table_gives_mean_and_interval(tmp_path):
    made = transfer(**TINY, out=str(tmp_path), name="x-s0")
    (tmp_path / "x-s0.json").unlink()
    values = {0: 50.0, 1: 54.0, 2: 52.0}
    for seed, value in values.items():
        p = made["parameters"] | dict(seed=seed, checkpoint=f"none-s{seed}.safetensors")
        run = made | dict(name=f"x-s{seed}", parameters=p, metrics=dict(AP50=value))
        record.write_record(run, tmp_path / f"x-s{seed}.json")
    row = transfer_table(tmp_path, metrics=["AP50"]).loc[("x", "AP50")]
    half = 4.302653 * 2 / 3**0.5  # t quantile, two degrees of freedom
    assert row.tolist() == pytest.approx([3, 52, 52 - half, 52 + half], abs=1e-4)
    odd = run | dict(parameters=run["parameters"] | dict(lr=0.5))
    record.write_record(odd, tmp_path / "x-s2.json")
    told = refusal(transfer_table, tmp_path, metrics=["AP50"])
    assert told == "the runs of setting 'x' differ in lr: 0.02 and 0.5."
    record.write_record(run | dict(marks_sha256="other"), tmp_path / "x-s2.json")
    assert "of different images or boxes" in refusal(transfer_table, tmp_path, metrics=["AP50"])
    assert "Did you mean 'AP50'?" in refusal(transfer_table, tmp_path, ["x-s0"], ["AP5"])


# The run notebook


def test_the_notebook_offers_the_functions_parameters():
    cells = nbformat.read(ROOT / "nbs/transfer.ipynb", 4).cells
    assert "skip_exec: true" in cells[0].source
    (source,) = (c.source for c in cells if "parameters" in c.metadata.get("tags", []))
    statements = ast.parse(source).body
    given = {s.target.id: ast.literal_eval(s.value) for s in statements}
    comments = dict(re.findall(r"^(\w+): .*? = .*?  # (.*)$", source, re.M))
    known = record.declared(transfer)
    assert list(given) == [name for name in known if name != "progress"]
    for name, value in given.items():
        assert value == known[name].default and type(value) is known[name].kind, name
        assert comments[name] == known[name].about.help, name


def test_a_transfer_keeps_every_parameter_that_it_was_given():
    tree = ast.parse((ROOT / "ftcl/detection.py").read_text())
    functions = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    calls = [n for n in ast.walk(functions["transfer"]) if isinstance(n, ast.Call)]
    call = next(n for n in calls if getattr(n.func, "id", "") == "dict")
    handed_on = {k.arg: k.value.id for k in call.keywords}
    assert handed_on == {a.arg: a.arg for a in functions["transfer"].args.args}


def test_the_notebook_runs(tmp_path):
    small = "-p size 64 -p rois 16 -p epochs 2 -p n_images 4".split()
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "nbs/transfer.ipynb"]
    made = subprocess.run(
        [*command, str(tmp_path / "out.ipynb"), *small, "-p", "out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr[-2000:]
    cells = nbformat.read(tmp_path / "out.ipynb", 4).cells
    outputs = [o for c in cells for o in c.get("outputs", [])]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 2
    wrong = subprocess.run(
        [*command, str(tmp_path / "no.ipynb"), "-p", "eopchs", "2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert wrong.returncode and "Did you mean 'epochs'?" in wrong.stdout + wrong.stderr


def test_torchvisions_roi_heads_count_background_as_zero():
    "The one convention that labels are shifted for"
    data = canvases(1, size=64)
    _, target = detection._Mirrored(data, False)[(0, False)]
    assert target["labels"].tolist() == (data.pictures[0].labels + 1).tolist()
    model = build_detector(Encoder().backbone, 3, size=64)
    assert model.roi_heads.box_predictor.cls_score.out_features == 4
    assert isinstance(model, torchvision.models.detection.FasterRCNN)
    assert Picture._fields[:2] == ("item", "id")
