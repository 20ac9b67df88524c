"""What an image processor does to pixels in [0, 1], as part of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


PIXELS = "pixels"
# PIL's resampling filters by their number.
_MODES = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
# Rounding to whole grey levels, once for each axis that is resized and once at the end.
_GREY = 4 / 255


class PixelInput(nn.Module):
    """Images in [0, 1] of any size, `(B, channels, height, width)`, to `pixel_values`: resize, crop, normalise.

    The processor rounds to whole grey levels while it resizes, which no Lipschitz function does, and cuts what is
    outside [0, 1]; this is the function without both.

    Args:
        image_processor (`BaseImageProcessor`):
            With a `size` of height and width, or of the shortest edge, and `image_mean` and `image_std`.

    Raises:
        ValueError: its resampling filter or its size has no counterpart here.
    """

    def __init__(self, image_processor: Any) -> None:
        super().__init__()
        self.eval()
        self.processor = type(image_processor).__name__
        mean, std = normalisation(image_processor)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.size = dict(image_processor.size) if getattr(image_processor, "do_resize", False) else None
        self.crop = dict(image_processor.crop_size) if getattr(image_processor, "do_center_crop", False) else None
        resample = getattr(image_processor, "resample", 2)
        self.mode = _MODES.get(int(resample) if resample is not None else 2)
        if self.size is not None and self.mode is None:
            raise ValueError(
                f"{self.processor} resamples by filter {resample}: resize the images yourself, and pass pixel_values"
            )

    def forward(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        target = self._target(height, width)
        if target != (height, width):
            options = {"align_corners": False, "antialias": True} if self.mode in ("bilinear", "bicubic") else {}
            pixels = functional.interpolate(pixels, size=target, mode=self.mode, **options)
        if self.crop is not None:
            top, left = (target[0] - self.crop["height"]) // 2, (target[1] - self.crop["width"]) // 2
            pixels = functional.pad(
                pixels,
                (-left, left + self.crop["width"] - target[1], -top, top + self.crop["height"] - target[0]),
            )
        return (pixels - self.mean.to(pixels.dtype)) / self.std.to(pixels.dtype)

    def check(self, image_processor: Any, channels: int, height: int, width: int) -> None:
        """Compares with what the processor gives for images of one size: flat ones, and one that varies smoothly.

        Raises:
            ValueError: they differ by more than the rounding to grey levels.
        """
        levels = torch.tensor([[0, 0, 0, 0], [255, 255, 255, 255], [40, 120, 200, 80]], dtype=torch.uint8)
        flats = [row[:channels, None, None].expand(-1, height, width) for row in levels]
        for image, most in (*((flat, 1e-4) for flat in flats), (_smooth(channels, height, width), _GREY)):
            found = self._processed(image_processor, image)
            expected = self(image[None].double() / 255)
            is_alike = found.shape == expected.shape
            if not is_alike or ((found - expected).abs() * self.std).max() > most:
                raise ValueError(
                    f"{self.processor} does not only resize, cut out the middle and normalise by a mean and deviation "
                    f"a channel at {height} x {width} pixels, so that the bound would be of another function: process "
                    "the images yourself, and pass pixel_values"
                )

    def _processed(self, image_processor: Any, image: Tensor) -> Tensor:
        array = image.permute(1, 2, 0).numpy()
        found = image_processor(array, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
        return torch.as_tensor(found).double()

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if self.size is None:
            return height, width
        if "height" in self.size and "width" in self.size:
            return self.size["height"], self.size["width"]
        if "shortest_edge" in self.size and "longest_edge" not in self.size:
            edge = self.size["shortest_edge"]
            if height <= width:
                return edge, int(edge * width / height)
            return int(edge * height / width), edge
        raise ValueError(
            f"{self.processor} resizes to {self.size}, which is not known here: resize the images "
            "yourself, and pass pixel_values"
        )


def _smooth(channels: int, height: int, width: int) -> Tensor:
    """A whole-number image whose channels, rows and columns can be told apart."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    planes = [0.5 + 0.3 * torch.sin(2.1 * x + 0.8 * c) + 0.2 * torch.cos(2.9 * y - c) for c in range(channels)]
    return (255 * torch.stack(planes)).round().to(torch.uint8)


def normalisation(processor: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation by channel, of shape (channels, 1, 1); 0 and 1 for a processor without them."""
    if not getattr(processor, "do_normalize", False):
        return torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    mean, std = (
        torch.as_tensor(getattr(processor, name), dtype=torch.float32) for name in ("image_mean", "image_std")
    )
    return mean.reshape(-1, 1, 1), std.reshape(-1, 1, 1)
