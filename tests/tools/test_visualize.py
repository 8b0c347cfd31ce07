"""tools/visualize.py: the patterns that attention sees, pictures of all three kinds, and wrong arguments."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch

pytest.importorskip("mmengine")

from datasets import make_coco
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from tiny import DETECTOR, tool, write_config

visualize = tool("visualize")
attention = __import__("_attention")

POINT = (0.5, 0.1)
IMAGE = torch.zeros(1, 3, 128, 128).normal_(generator=torch.Generator().manual_seed(0))


def weights_of(model, layer, point=POINT, image=IMAGE):
    model = model.eval().requires_grad_(False)
    assert layer in attention.find_layers(model, image)
    return attention.attention_weights(model, image, layer, point)


def box(rows, columns, size=32):
    """Return a map that is true at these rows and columns."""
    seen = torch.zeros(size, size, dtype=torch.bool)
    seen[torch.tensor(list(rows))[:, None], torch.tensor(list(columns))] = True
    return seen


# Row 16 and column 3 of a map of 32x32, as 0.5 and 0.1 say.
SMALL = dict(embed_dim=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), num_classes=0)


@pytest.mark.parametrize(
    ("dilation", "rows", "columns"),
    [
        (1, range(13, 20), range(0, 7)),
        # Every fourth position; at the edge, the same seven are shifted into the map.
        (4, range(4, 32, 4), range(3, 31, 4)),
    ],
)
def test_neighborhood(dilation, rows, columns):
    model = timm.create_model("dinat_mini", dilations=((dilation,), (1,), (1,), (1,)), **SMALL)
    weights = weights_of(model, "levels.0.blocks.0.attn")
    assert torch.equal(weights > 0, box(rows, columns))
    assert weights.sum().item() == pytest.approx(1, abs=1e-5)


def test_windows_and_grids():
    # Windows of 8x8, and 8x8 positions spread over the map.
    model = timm.create_model("densezoo_maxvit_pico_rw_256", num_classes=0)
    weights = weights_of(model, "stages.0.blocks.0.attn_block.attn")
    assert torch.equal(weights > 0, box(range(16, 24), range(8)))
    assert weights.sum().item() == pytest.approx(1, abs=1e-5)
    weights = weights_of(model, "stages.0.blocks.0.attn_grid.attn")
    assert torch.equal(weights > 0, box(range(0, 32, 4), range(3, 32, 4)))


def test_windows_of_a_padded_map():
    """Channel attention is no attention over positions, and what a window pads the map with is not shown."""
    model = timm.create_model("densezoo_davit_tiny", depths=(1, 1, 1, 1), num_classes=0)
    layers = attention.find_layers(model, IMAGE)
    assert len(layers) == 4 and all(".0.attn" in name for name in layers)
    weights = weights_of(model, "stages.0.blocks.0.0.attn", (0.99, 0.99))
    # The last window of 7x7 has four rows and columns of the 32 in the map.
    assert torch.equal(weights > 0, box(range(28, 32), range(28, 32)))
    assert 0 < weights.sum().item() < 1


@pytest.mark.parametrize("name", ["agent_deit_tiny", "agent_pvt_tiny", "agent_cswin_tiny", "flatten_pvt_v2_b0"])
def test_agents_and_linear_attention_see_all(name):
    model = timm.create_model(name, num_classes=0)
    layer = next(iter(attention.find_layers(model.eval(), IMAGE)))
    weights = weights_of(model, layer)
    assert weights.shape in ((32, 32), (8, 8)) and (weights > 0).all()


def test_quadtree_looks_closely_at_few_positions():
    weights = weights_of(timm.create_model("quadtree_a_b0", num_classes=0), "block1.0.attn")
    assert weights.shape == (32, 32) and weights.sum().item() == pytest.approx(1, abs=1e-5)
    weights = weights_of(timm.create_model("quadtree_b0", num_classes=0), "block1.0.attn")
    closely = weights > 4 * weights.median()
    assert 0 < closely.sum() < weights.numel() / 2


def test_a_model_without_attention_over_positions():
    assert attention.find_layers(timm.create_model("densezoo_poolformer_s12").eval(), IMAGE) == {}


@pytest.fixture
def photo(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photo.png")
    return "photo.png"


@pytest.mark.parametrize("what", ["features", "attention"])
def test_pictures(photo, capsys, what):
    visualize.main([what, "quadtree_b0", photo, "--short-side", "64", "--out-dir", "out"])
    out = capsys.readouterr().out
    picture = Image.open(f"out/photo_quadtree_b0_{what}.png")
    assert np.asarray(picture).std() > 10 and picture.width > 4 * picture.height
    assert [path.name for path in Path("out").iterdir()] == [f"photo_quadtree_b0_{what}.png"]
    assert "its weights are random" in out and f"saved to out/photo_quadtree_b0_{what}.png" in out
    if what == "attention":
        # one layer a stage; the image of 60x90 becomes one of 64x96
        shown = [line.split(":")[0] for line in out.splitlines() if ": sees " in line]
        assert shown == [f"block{i}.1.attn" for i in (1, 2, 3, 4)] and "16 x 24 positions" in out


def test_weights_and_pixel(photo, capsys):
    model = timm.create_model("flatten_pvt_v2_b0")
    torch.save(model.state_dict(), "weights.pth")
    options = ["--checkpoint", "weights.pth", "--layer", "block1.0.attn", "--pixel", "59", "89", "--short-side", "64"]
    visualize.main(["attention", "flatten_pvt_v2_b0", photo, *options])
    out = capsys.readouterr().out
    assert "random" not in out and "block1.0.attn: sees 384 of 16 x 24 positions" in out
    assert Path("pictures/photo_flatten_pvt_v2_b0_attention.png").is_file()


def test_components_are_colours():
    features = torch.zeros(8, 4, 6)
    features[0, :, 3:] = 5.0
    picture = visualize.main_components(features)
    assert picture.shape == (4, 6, 3) and picture.min() >= 0 and picture.max() <= 1
    # The main component parts the halves.
    assert abs(picture[0, 0, 0] - picture[0, 5, 0]) == 1 and (picture[:, :3, 0] == picture[0, 0, 0]).all()


def test_predictions(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write_config(Path("detector.py"), DETECTOR, make_coco(tmp_path / "data", num_images=3))
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    torch.save({"state_dict": MODELS.build(cfg.model).state_dict()}, "model.pth")
    visualize.main(["predictions", str(path), "model.pth", "--count", "2"])
    assert "2 of 3 images; saved to pictures" in capsys.readouterr().out
    pictures = sorted(Path("pictures").iterdir())
    assert [picture.name for picture in pictures] == ["000000_000000000001.png", "000002_000000000003.png"]
    # Ground truth and prediction are beside each other.
    assert all(Image.open(picture).size == (256, 96) for picture in pictures)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["features", "quadtree_b00", "photo.png"], "model: there is no 'quadtree_b00'; did you mean 'quadtree_b0'?"),
        (["features", "quadtree_b0", "foto.png"], "foto.png: cannot be read as an image; did you mean"),
        (["features", "quadtree_b0", "photo.png", "--short-side", "3"], "--short-side: got 3, expected at least 32"),
        (["features", "quadtree_b0", "photo.png", "--checkpoint", "none.pth"], "none.pth"),
        (
            ["attention", "quadtree_b0", "photo.png", "--pixel", "60", "0"],
            "--pixel: got 60 0, expected one of the",
        ),
        (["attention", "quadtree_b0", "photo.png", "--layer", "block1.0.atn"], "did you mean 'block1.0.attn'?"),
        (["attention", "densezoo_poolformer_s12", "photo.png"], "has no attention over positions"),
        (["predictions", "none.py", "model.pth"], "none.py: there is no such config"),
    ],
)
def test_mistakes(photo, capsys, arguments, message):
    with pytest.raises(SystemExit) as end:
        visualize.main([*arguments, "--out-dir", "out"])
    assert end.value.code == 2 and not Path("out").exists()
    assert message in capsys.readouterr().err
