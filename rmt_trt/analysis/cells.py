"""The cells in which an attention map is drawn: a large one for each token that matters, a small one for much noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rmt_trt.analysis.layout import SPECIAL, Region

NOISE_CELLS = 48  # cells of noise along an axis, about; below as many tokens none is pooled
LARGE, SMALL = 3.0, 1.0  # side of a cell: of a token that matters, of noise


@dataclass(frozen=True)
class Cells:
    """Cells along an axis of a map.

    starts  the position at which each cell begins, and at the end the number of positions
    edges   where each cell begins in the picture, and where the last one ends
    bands   (region's name, from, to) in the picture
    words   (place in the picture, word) of tokens that are drawn one by one
    pool    tokens of noise in a cell
    """

    starts: tuple[int, ...]
    edges: tuple[float, ...]
    bands: tuple[tuple[str, float, float], ...]
    words: tuple[tuple[float, str], ...]
    pool: int

    def label(self, name: str) -> str:
        """What a region is called on an axis."""
        return "special" if name in SPECIAL else name

    def runs(self, positions: np.ndarray) -> list[tuple[float, float]]:
        """(from, to) in the picture of each run of cells in which some of the positions lie."""
        inside = sorted({int(np.searchsorted(self.starts, position, "right")) - 1 for position in positions.tolist()})
        found: list[tuple[float, float]] = []
        for cell in inside:
            start, stop = self.edges[cell], self.edges[cell + 1]
            if found and found[-1][1] == start:
                found[-1] = (found[-1][0], stop)
            else:
                found.append((start, stop))
        return found


def cells_of(regions: Sequence[Region], words: Sequence[str] | None = None) -> Cells:
    """The cells of a map's positions. `words`: of the segment's text, which are shown at facts and the question."""
    noise = sum(region.stop - region.start for region in regions if region.name == "noise")
    pool = max(1, round(noise / NOISE_CELLS))
    starts: list[int] = []
    edges, bands, shown = [0.0], [], []
    text = next((region.start for region in regions if region.name in ("noise", "fact", "question")), 0)
    for region in regions:
        step, side = (pool, SMALL) if region.name == "noise" else (1, LARGE)
        here = edges[-1]
        for start in range(region.start, region.stop, step):
            starts.append(start)
            edges.append(edges[-1] + side)
            if words is not None and region.name in ("fact", "question"):
                shown.append((edges[-1] - side / 2, words[start - text]))
        bands.append((region.name, here, edges[-1]))
    return Cells((*starts, regions[-1].stop), tuple(edges), tuple(bands), tuple(shown), pool)


def pooled(one: np.ndarray, cells: Cells) -> np.ndarray:
    """A map (n, n) -> (cells, cells): the mean of what lies in each cell."""
    starts = np.array(cells.starts[:-1])
    sizes = np.diff(cells.starts)
    summed = np.add.reduceat(np.add.reduceat(one, starts, axis=0), starts, axis=1)
    return summed / np.outer(sizes, sizes)
