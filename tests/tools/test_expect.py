"""tools/test.py --expect and --tta: comparison with the model card, mirror images, and where ImageNet may lie."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook

pytest.importorskip("mmengine")

from datasets import make_ade20k, make_coco, make_imagenet
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from tiny import CLASSIFIER, DETECTOR, SEGMENTOR, tool, write_classes, write_config

test = tool("test")
expect = __import__("_expect")
# Named as configs of the zoo, whose numbers a tiny untrained model does not reach.
CASES = {
    "classifier": ("nat-tiny_in1k.py", CLASSIFIER, write_classes),
    "detector": ("mask-rcnn_nat-tiny_fpn_3x_coco.py", DETECTOR, make_coco),
    "segmentor": ("upernet_nat-tiny_160k_ade20k-512x512.py", SEGMENTOR, make_ade20k),
}


@pytest.fixture(scope="module", params=CASES)
def trained(request, tmp_path_factory):
    name, base, make = CASES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    path = write_config(folder / name, base, make(folder / "data"))
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    torch.save({"state_dict": MODELS.build(cfg.model).state_dict()}, folder / "weights.pth")
    return request.param, str(path), str(folder / "weights.pth")


def test_gap_and_tolerance(trained, tmp_path, capfd):
    task, path, checkpoint = trained
    arguments = [path, checkpoint, "--work-dir", str(tmp_path / "work")]
    assert test.main([*arguments, "--expect"]) == 1
    out = capfd.readouterr().out
    card = {"classifier": "top-1: published 83.2", "detector": "box AP: published 47.7", "segmentor": "mIoU: published"}
    assert "GAP: nat/" in out and "nat_tiny, " in out and card[task] in out and "(tolerance 0.1)" in out
    assert (tmp_path / "work" / "metrics.json").is_file()
    assert test.main([*arguments, "--expect", "100"]) == 0
    assert "ok: nat/" in (out := capfd.readouterr().out) and "GAP" not in out


def test_augmentation(trained, tmp_path, capsys):
    """The model sees mirror images too, or what the config has, and the metrics are all there."""
    task, path, checkpoint = trained
    results, images = {}, {}
    for option in ([], ["--tta"]):
        out, seen = tmp_path / f"{len(option)}.json", []
        handle = register_module_forward_hook(
            lambda module, args, _, seen=seen: seen.extend(args[0]) if type(module).__name__ == "NAT" else None
        )
        assert not test.main([path, checkpoint, "--work-dir", str(tmp_path / "w"), "--out", str(out), *option])
        handle.remove()
        results[len(option)], images[len(option)] = json.loads(out.read_text()), seen
    assert results[0].keys() == results[1].keys()
    assert len(images[1]) >= 2 * len(images[0]) > 0
    assert any(torch.equal(image.flip(-1), images[1][0]) for image in images[1])
    if task == "segmentor":
        assert results[0] != results[1]
    if task == "classifier":
        with pytest.raises(SystemExit) as end:
            test.main([path, checkpoint, "--work-dir", str(tmp_path / "new"), "--tta", "--expect"])
        assert end.value.code == 2 and not (tmp_path / "new").exists()
        assert "nat_tiny.md has no result of nat-tiny_in1k.py with --tta" in capsys.readouterr().err


@pytest.mark.parametrize(("measured", "good"), [(47.6, True), (47.59, False), (47.8, True), (None, False)])
def test_compare(measured, good, capsys):
    expected = expect.find_expected("mask-rcnn_nat-tiny_fpn_3x_coco.py", tta=False)
    metrics = {"coco/segm_mAP": 0.426}
    if measured is not None:
        metrics["coco/bbox_mAP"] = measured / 100
    assert expect.compare(expected, metrics, 0.1) == good
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("ok: ") and lines[0].startswith("ok: " if good else "GAP: ")
    assert ("coco/bbox_mAP was not measured" in lines[0]) == (measured is None)


def test_multi_scale_result_is_that_of_augmentation():
    config = "configs/nat/upernet_nat-tiny_160k_ade20k-512x512.py"
    assert expect.find_expected(config, True)["measure"] == {"multi-scale mIoU": (48.4, "mIoU", 1)}
    assert expect.find_expected(config, False)["measure"] == {"mIoU": (47.1, "mIoU", 1)}


def test_unknown_config(tmp_path, capsys):
    path = write_config(tmp_path / "nat-tinny_in1k.py", CLASSIFIER, tmp_path)
    with pytest.raises(SystemExit) as end:
        test.main([str(path), "none.pth", "--expect"])
    assert end.value.code == 2
    assert "named nat-tinny_in1k.py; did you mean 'nat-tiny_in1k.py'?" in capsys.readouterr().err


def test_masks_of_mirror_images_are_mirrored_back():
    """A detector that sees the same object in both views gives it once, where it is."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData
    from torch import nn

    import densezoo.tta

    module = nn.Identity()
    module.test_step = lambda data: data
    model = densezoo.tta.InstanceTTAModel(
        module=module, tta_cfg=Config(dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=100))
    )
    mask = torch.zeros(1, 20, 30, dtype=torch.bool)
    mask[:, 2:8, 5:12] = True
    views = []
    for flip, box, view, score in ((False, [5, 2, 12, 8], mask, 0.7), (True, [18, 2, 25, 8], mask.flip(-1), 0.9)):
        meta = dict(ori_shape=(20, 30), flip=flip, flip_direction="horizontal" if flip else None)
        sample = DetDataSample(metainfo=meta)
        sample.pred_instances = InstanceData(
            bboxes=torch.tensor([box], dtype=torch.float), scores=torch.tensor([score]),
            labels=torch.tensor([3]), masks=view,
        )  # fmt: skip
        views.append(sample)
    (merged,) = model.merge_preds([views])
    assert merged.pred_instances.bboxes.tolist() == [[5, 2, 12, 8]]
    assert merged.pred_instances.scores.item() == pytest.approx(0.9)
    assert torch.equal(merged.pred_instances.masks, mask)


@pytest.mark.parametrize("layout", ["files", "folders", "timm"])
def test_imagenet_layouts(layout, tmp_path, monkeypatch):
    """With a list of labels, in class folders, and in class folders under timm's validation/."""
    root = make_imagenet(tmp_path / "data")
    if layout != "files":
        for line in (root / "meta" / "val.txt").read_text().splitlines():
            name, label = line.split()
            folder = root / "val" / sorted(p.name for p in (root / "train").iterdir())[int(label)]
            folder.mkdir(exist_ok=True)
            (root / "val" / name).rename(folder / name)
        (root / "meta" / "val.txt").unlink()
    if layout == "timm":
        (root / "val").rename(root / "validation")
    changes = """
    pipeline = val_dataloader["dataset"]["pipeline"]
    dataset = dict(type="ImageNet", data_root="ROOT", split="val", metainfo=dict(classes=list("abcd")))
    val_dataloader["dataset"] = dict(**dataset, pipeline=pipeline)
    test_dataloader = val_dataloader
    """.replace("ROOT", str(root))
    monkeypatch.chdir(tmp_path)
    path = write_config(tmp_path / f"{tmp_path.name}.py", CLASSIFIER, root, changes)
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    torch.save({"state_dict": MODELS.build(cfg.model).state_dict()}, "weights.pth")
    assert test.main([str(path), "weights.pth", "--out", "metrics.json"]) == 0
    metrics = json.loads(Path("metrics.json").read_text())
    assert metrics.keys() == {"accuracy/top1", "accuracy/top2"}
    assert 0 <= metrics["accuracy/top1"] <= metrics["accuracy/top2"] <= 100
