"""What tools/test.py is told to compare with, and the models and pipelines of test-time augmentation."""

from copy import deepcopy
from pathlib import Path

from _common import get_dataset
from _errors import ConfigError, did_you_mean
from _facts import CARDS, METRICS, load_facts
from mmengine.config import Config
from mmengine.dist import is_main_process

# Key in the facts -> what an evaluator calls it, and how many of the facts' units its unit is; the facts' are per cent.
MEASURED = {
    "top1": ("accuracy/top1", 1),
    "box_ap": ("coco/bbox_mAP", 100),
    "mask_ap": ("coco/segm_mAP", 100),
    "pq": ("coco_panoptic/PQ", 1),
    "miou": ("mIoU", 1),
    "macc": ("mAcc", 1),
}
# The same with test-time augmentation, which papers publish of segmentation alone.
MEASURED_TTA = {"miou_ms": ("mIoU", 1)}


def find_expected(config: str, tta: bool) -> dict:
    """Return the result of the model card that a config is to reach, with `model` and what to `measure`.

    Raises:
        ConfigError: No card has a result of a config of this name, or none of this kind of test.
    """
    name, known = Path(config).name, {}
    for path in sorted((CARDS / "facts").glob("*.yaml")):
        for model, entry in load_facts(path)["models"].items():
            known |= {Path(r["config"]).name: r | {"model": model} for r in entry["results"] if "config" in r}
    if name not in known:
        near = did_you_mean(name, known)
        raise ConfigError(f"--expect: no model card has a result of a config named {name}{near}")
    result = known[name]
    names = MEASURED_TTA if tta else MEASURED
    result["measure"] = {METRICS[key][0]: (result[key], *names[key]) for key in names if key in result}
    if not result["measure"]:
        kind = "with" if tta else "without"
        raise ConfigError(f"--expect: {CARDS.name}/{result['model']}.md has no result of {name} {kind} --tta")
    return result


def compare(expected: dict, metrics: dict, tolerance: float) -> bool:
    """Print what was expected and measured; return whether every metric is within the tolerance."""
    reached = True
    for name, (value, key, factor) in expected["measure"].items():
        measured = metrics.get(key)
        # rounded: 47.7 is 0.1 from 47.6, which their difference in binary is not
        gap = None if measured is None else round(factor * measured - value, 6)
        good = gap is not None and abs(gap) <= tolerance
        reached &= good
        found = f"{key} was not measured" if gap is None else f"measured {factor * measured:.2f}, a gap of {gap:+.2f}"
        if is_main_process():
            print(
                f"{'ok' if good else 'GAP'}: {expected['config']}, {expected['model']}, {expected['dataset']} {name}: "
                f"{expected['status']} {value}, {found} (tolerance {tolerance:g})"
            )
    return reached


def add_test_time_augmentation(cfg: Config) -> None:
    """Wrap model and pipeline as the config's `tta_model` and `tta_pipeline` say, else to average mirror images.

    Raises:
        ConfigError: The config has neither, and its task has no test-time augmentation.
    """
    dataset = get_dataset(cfg, "test_dataloader")
    scope = cfg.get("default_scope")
    if scope == "mmdet":
        # registers it
        import densezoo.tta  # noqa: F401
    default = {
        "mmdet": dict(
            type="densezoo.InstanceTTAModel",
            tta_cfg=dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=100),
        ),
        "mmseg": dict(type="mmseg.SegTTAModel"),
        "mmpretrain": dict(type="mmpretrain.AverageClsScoreTTA"),
    }.get(scope)
    model = cfg.get("tta_model") or default
    panoptic = "Panoptic" in str(dataset["type"])
    if model is None or panoptic and "tta_model" not in cfg:
        what = "panoptic segmentation" if panoptic else f"default_scope {scope!r}"
        raise ConfigError(f"--tta: there is no default for {what}; set tta_model and tta_pipeline in the config")
    pipeline = cfg.get("tta_pipeline") or mirror_pipeline(dataset["pipeline"], scope)
    dataset["pipeline"] = deepcopy(pipeline)
    # mmengine gives only the outermost model what the config has beside it.
    if cfg.get("data_preprocessor"):
        cfg.model.setdefault("data_preprocessor", cfg.data_preprocessor)
    cfg.model = dict(model, module=cfg.model)


def mirror_pipeline(pipeline: list[dict], scope: str) -> list[dict]:
    """Return a test pipeline that gives every image as it is and mirrored."""
    *steps, pack = deepcopy(list(pipeline))
    if "Pack" not in str(pack["type"]):
        raise ConfigError(f"--tta: test pipeline: its last step is {pack['type']}, expected one that packs the inputs")
    first = next((i for i, step in enumerate(steps) if "Annotations" in str(step["type"])), len(steps))
    if scope == "mmdet":
        pack["meta_keys"] = (*pack.get("meta_keys", ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
                             "flip", "flip_direction")  # fmt: skip
    flips = [dict(type="RandomFlip", prob=prob) for prob in (0.0, 1.0)]
    # Ground truth is loaded after the flip, which leaves it unmirrored.
    views = [flips, *([step] for step in steps[first:]), [pack]]
    return [*steps[:first], dict(type="TestTimeAug", transforms=views)]
