"""Check the data sets of a config before a training: files, sizes, classes, boxes, labels; see tools/README.md."""

import os
import sys
from collections.abc import Iterator, Sequence

from _check_coco import check_coco, check_coco_panoptic
from _check_folders import check_classification, check_segmentation
from _check_report import Report
from _common import Start, load_config, make_parser
from _errors import ConfigError, describe
from _explain import unknown_type
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

# Class of a dataset, or nearest base of it -> its check.
CHECKS = {
    "CocoPanopticDataset": check_coco_panoptic,
    "CocoDataset": check_coco,
    "BaseSegDataset": check_segmentation,
    "CustomDataset": check_classification,
}
LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")


def main(argv: Sequence[str] | None = None) -> int:
    """Check as the command line says; return 2 if there is something to fix."""
    parser = make_parser(__doc__)
    parser.add_argument("config", help="config file")
    args = parser.parse_args(argv)
    with Start() as start:
        start.cfg = cfg = load_config(args, ())
        init_default_scope(cfg.get("default_scope") or "mmengine")
        datasets = list(find_datasets(cfg))
        if not datasets:
            raise ConfigError(f"{args.config}: it has no dataset; expected one of {', '.join(LOADERS)}")
        problems = sum(check(cfg, place, dataset) for place, dataset in datasets)
        problems += check_evaluators(cfg)
    print(f"{problems} problem(s) to fix" if problems else "nothing to fix")
    return 2 if problems else 0


def find_datasets(cfg: Config) -> Iterator[tuple[str, dict]]:
    """Yield place and config of every dataset, out of its wrappers, one with the same files once."""
    seen = []

    def leaves(node: object, place: str) -> Iterator[tuple[str, dict]]:
        if not isinstance(node, dict):
            raise ConfigError(f"{place}: is {node!r:.80}, expected a dict with 'type'")
        inner = {"dataset": node["dataset"]} if "dataset" in node else {}
        if isinstance(several := node.get("datasets"), list | tuple):
            inner |= {f"datasets.{i}": part for i, part in enumerate(several)}
        for key, part in inner.items():
            yield from leaves(part, f"{place}.{key}")
        if not inner:
            yield place, node

    for loader in LOADERS:
        if cfg.get(loader) is None:
            continue
        for place, dataset in leaves(cfg[loader], loader):
            files = {key: dataset.get(key) for key in ("type", "data_root", "ann_file", "data_prefix", "split")}
            if files not in seen:
                seen.append(files)
                yield place, dataset


def check(cfg: Config, place: str, dataset: dict) -> int:
    """Check a dataset and print what was found; return the number of problems."""
    kind, report = dataset.get("type"), Report()
    if not isinstance(kind, str | type):
        raise ConfigError(f"{place}.type: is {kind!r:.80}, expected the name of a dataset")
    with DATASETS.switch_scope_and_registry(None) as registry:
        cls = registry.get(kind) if isinstance(kind, str) else kind
        if cls is None:
            raise ConfigError(unknown_type(kind, registry, cfg))
    run = next((CHECKS[base.__name__] for base in cls.__mro__ if base.__name__ in CHECKS), None)
    if run is None:
        print(f"{place}: {cls.__name__}: not checked; this tool knows {', '.join(CHECKS)} and what derives from them")
        return 0
    try:
        metainfo = cls._load_metainfo(dataset.get("metainfo"))
        count = run(dataset, cls, metainfo, report)
    except ConfigError as error:
        raise ConfigError(str(error).replace("dataset.", f"{place}.", 1)) from error
    # What is so damaged that no check foresees it is still a problem of the data, to be told in one line.
    except Exception as error:
        if os.environ.get("DENSEZOO_DEBUG"):
            raise
        count = 0
        report.problem("data that cannot be checked", describe(error), "see where with DENSEZOO_DEBUG=1")
    print(f"{place}: {cls.__name__}, {count} images: {report.problems} problem(s)")
    if report.found:
        print(report)
    return report.problems


def check_evaluators(cfg: Config) -> int:
    """Print which annotation files of evaluators are missing; return their number."""
    missing = []
    for key in ("val_evaluator", "test_evaluator"):
        evaluators = cfg.get(key) or ()
        for evaluator in [evaluators] if isinstance(evaluators, dict) else evaluators:
            path = evaluator.get("ann_file") if isinstance(evaluator, dict) else None
            if path and not (isinstance(path, str) and os.path.isfile(path)):
                missing.append(f"{key}.ann_file: there is no file {path!r:.200}")
    print("".join(f"  PROBLEM: {line}; correct the path\n" for line in missing), end="")
    return len(missing)


if __name__ == "__main__":
    sys.exit(main())
