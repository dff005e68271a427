"""Part b: the SNR scan of Llama-3.1-8B shapes against torch.linalg.svdvals on the same card.

The weights are random, in bfloat16, and made on the card; the scan is the project's own, as snr-analyze calls it.
The reference is what Spectrum calls, in float32, once per shape and counted as often as the shape occurs, upright
or across. Where they differ, it is the reference that float32 makes inexact: correctness compares with float64.
"""

from __future__ import annotations

import contextlib
import time
import zlib

import torch
from spectraqlora.models.hardware import device
from spectraqlora.models.headers import Entry, Header
from spectraqlora.models.tensors import Tensors
from spectraqlora.snr.marchenko_pastur import from_singular_values
from spectraqlora.snr.scan import scan

from tests.gpu.prepare import wait_for
from tests.gpu.record import Part, part, timed
from tests.gpu.shapes import Shape, sizes

_SPARE = 25
"""Seconds that the scan itself takes."""


class RandomTensors(Tensors):
    """A checkpoint without files: every matrix is drawn on the device when it is read, always the same.

    Args:
        shape: of the model.
        layers: how many of its layers.
    """

    def __init__(self, shape: Shape, layers: int) -> None:
        self.dimensions = {name: size for layer in range(layers) for name, size in shape.matrices(layer)}
        entries = {
            name: Entry("BF16", (rows, cols), 0, 2 * rows * cols)
            for name, (rows, cols) in self.dimensions.items()
        }
        super().__init__({"random": Header(entries, 0)}, {}, {}, "random", "random")

    def _raw(self, name: str, index: int | None = None) -> torch.Tensor:
        rows, cols = self.dimensions[name]
        generator = torch.Generator(device()).manual_seed(zlib.crc32(name.encode()))

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device=device())

        # A bulk of noise, and a few directions about ten times stronger.
        strong = draw(rows, 8) @ draw(8, cols)
        return (0.02 * (draw(rows, cols) + 10 / min(rows, cols) ** 0.5 * strong)).bfloat16()


def run(given: Part) -> None:
    chosen = sizes(given.small)
    with contextlib.suppress(
        SystemExit
    ):  # Nothing is timed while gigabytes of checkpoints are written, if they are.
        for stage in chosen.stages:
            wait_for(stage, given, spare=_SPARE)
    tensors = RandomTensors(chosen.model, chosen.scan_layers)
    # Libraries load and handles are made on small matrices.
    scan(RandomTensors(Shape(256, 512, 1, 4, 2, 8), 1))
    torch.linalg.svdvals(torch.randn(256, 512, device=device()))

    with timed() as meter:
        table = scan(tensors)
    ours = dict(zip(table["module"], table["snr"], strict=True))
    given.record.put("scan", {"matrices": len(table), "seconds": meter.seconds(), "peak_bytes": meter.peak})
    shapes: dict[tuple[int, int], list[str]] = {}
    for name in tensors.names():
        rows, cols = sorted(tensors.dimensions[name])
        shapes.setdefault((rows, cols), []).append(name)
    # Short ones first: what is cut off is then only the last.
    for (rows, cols), names in sorted(shapes.items()):
        weight = tensors.load(names[0]).float()
        began = time.monotonic()
        with timed() as meter:
            values = torch.linalg.svdvals(weight)
        expected = from_singular_values(values.cpu(), (rows, cols)).snr
        own = ours[names[0].removesuffix(".weight")]
        given.record.add(
            "svdvals",
            {
                "shape": [rows, cols],
                "matrices": len(names),
                "seconds": meter.seconds(),
                "peak_bytes": meter.peak,
                "snr": own,
                "snr_of_svdvals": expected,
                "relative_difference": abs(own / expected - 1) if own != expected else 0.0,
            },
        )
        # The next shape takes at most about four times as long.
        if given.left() < 4 * (time.monotonic() - began):
            return


if __name__ == "__main__":
    with part(__doc__) as given:
        run(given)
