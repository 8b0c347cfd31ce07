"""Test-time augmentation of instance segmentation, which mmdet has for boxes alone."""

# before mmcv.ops and mmdet, which look for compiled operators
from densezoo.openmmlab import MODELS  # isort: skip

import torch
from mmcv.ops import batched_nms
from mmdet.models.test_time_augs import DetTTAModel
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_flip


@MODELS.register_module()
class InstanceTTAModel(DetTTAModel):
    """Detects in every view of an image and keeps what is left by non-maximum suppression, with its masks, if any.

    Args:
        module: The detector.
        tta_cfg: `nms` and `max_per_img`, as of `DetTTAModel`.
    """

    def _merge_single_sample(self, data_samples: list[DetDataSample]) -> DetDataSample:
        found = []
        for sample in data_samples:
            instances = sample.pred_instances
            if sample.flip:
                instances.bboxes = bbox_flip(instances.bboxes, sample.ori_shape, sample.flip_direction)
                if "masks" in instances:
                    axes = {"horizontal": (-1,), "vertical": (-2,), "diagonal": (-2, -1)}[sample.flip_direction]
                    instances.masks = torch.as_tensor(instances.masks).flip(axes)
            found.append(instances)
        merged = found[0].cat(found)
        if len(merged):
            boxes, kept = batched_nms(merged.bboxes, merged.scores, merged.labels, self.tta_cfg.nms)
            merged = merged[kept]
            # suppression may lower scores
            merged.scores = boxes[:, -1]
            merged = merged[: self.tta_cfg.max_per_img]
        data_samples[0].pred_instances = merged
        return data_samples[0]
