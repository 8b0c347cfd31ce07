"""What stands in for panopticapi: ids in colours, and panoptic quality."""

import math

import numpy as np
import pytest

from densezoo.panoptic import OFFSET, VOID, PQStat, id2rgb, rgb2id

CATEGORIES = {1: dict(isthing=1), 5: dict(isthing=1), 92: dict(isthing=0), 93: dict(isthing=0)}


def test_ids_and_colours():
    ids = np.array([[VOID, 1, 255], [256, 65536 + 2 * 256 + 3, OFFSET - 1]])
    colours = id2rgb(ids)
    assert colours.dtype == np.uint8
    assert colours[1].tolist() == [[0, 1, 0], [3, 2, 1], [255, 255, 255]]
    np.testing.assert_array_equal(rgb2id(colours), ids)


def test_panoptic_quality():
    one, two = PQStat(), PQStat()
    one[1].tp, one[1].iou, one[1].fp = 1, 0.8, 1
    two[1].tp, two[1].iou, two[1].fn = 1, 0.6, 1
    two[92].fn = 1
    one += two
    # 1.4 / (2 + 1), 1.4 / 2, 2 / 3 of the things, zeros of the stuff; two categories have no segment
    things, of_each = one.pq_average(CATEGORIES, isthing=True)
    assert things == pytest.approx(dict(pq=1.4 / 3, sq=0.7, rq=2 / 3, n=1))
    assert of_each == {1: pytest.approx(dict(pq=1.4 / 3, sq=0.7, rq=2 / 3)), 5: dict(pq=0, sq=0, rq=0)}
    assert one.pq_average(CATEGORIES, isthing=False)[0] == dict(pq=0, sq=0, rq=0, n=1)
    average, of_each = one.pq_average(CATEGORIES, isthing=None)
    assert average == pytest.approx(dict(pq=0.7 / 3, sq=0.35, rq=1 / 3, n=2))
    assert of_each.keys() == CATEGORIES.keys()
    assert math.isnan(PQStat().pq_average(CATEGORIES, isthing=None)[0]["pq"])


def test_perfect_prediction_by_mmdet(tmp_path):
    """The ground truth as the prediction has a quality of 1 in every category, by mmdet's own matching."""
    pytest.importorskip("densezoo.openmmlab")
    from mmdet.evaluation.functional.panoptic_utils import pq_compute_single_core
    from PIL import Image

    ids = np.array([[1, 1, 2], [3, 3, 2]]).repeat(4, 0)
    Image.fromarray(id2rgb(ids)).save(tmp_path / "0.png")
    segments = [dict(id=1, category_id=1), dict(id=2, category_id=5), dict(id=3, category_id=92)]
    segments = [dict(segment, area=8, iscrowd=0) for segment in segments]
    truth = dict(image_id=0, file_name="0.png", segments_info=segments)
    stat = pq_compute_single_core(0, [(truth, truth)], str(tmp_path), str(tmp_path), CATEGORIES)
    assert stat.pq_average(CATEGORIES, isthing=None)[0] == dict(pq=1, sq=1, rq=1, n=3)
