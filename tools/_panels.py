"""Panels of tools/visualize.py: an image beside the maps, or beneath the weights, of a model."""

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor


def main_components(features: Tensor) -> np.ndarray:
    """Return a picture (H, W, 3) of a map (C, H, W): its three main components, each from 0 to 1."""
    flat = features.flatten(1).T.double()
    flat = flat - flat.mean(0)
    components = flat @ torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -3:].flip(1)
    low, high = components.amin(0), components.amax(0)
    return ((components - low) / (high - low).clamp(min=1e-12)).unflatten(0, features.shape[1:]).numpy()


def draw_panels(
    image: Image.Image, panels: list[tuple[str, np.ndarray | Tensor | None]], point: tuple[float, float] | None
) -> Figure:
    """Return a figure of panels side by side, each with its title.

    Args:
        image: What a model was given.
        panels: Titles, and with each a picture (H, W, 3), weights (H, W) to lay over the image, or None for the image.
        point: Row and column to mark, from 0 to 1.
    """
    figure = Figure(figsize=(4 * len(panels), 4 * image.height / image.width + 0.7), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    place = dict(extent=(0, image.width, image.height, 0))
    for axis, (title, content) in zip(axes, panels, strict=True):
        if content is None or content.ndim == 2:
            axis.imshow(image, **place)
        if content is not None and content.ndim == 3:
            axis.imshow(content, **place)
        elif content is not None:
            # dark where nothing is seen
            axis.imshow(np.zeros(content.shape), cmap="gray", alpha=0.75 * (content.numpy() == 0), **place)
            shown = np.ma.masked_equal(content.numpy(), 0)
            axis.imshow(shown, cmap="viridis", vmin=0, alpha=0.65, **place)
        if point:
            axis.plot(point[1] * image.width, point[0] * image.height, "r+", markersize=12, markeredgewidth=2)
        axis.set_title(title, fontsize=9)
        axis.set_axis_off()
    return figure
