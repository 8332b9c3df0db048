"""The person's mask: grown, coarsened, kept."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import maximum_filter

from wanloom.errors import InputError, WanloomWarning
from wanloom.preprocess.masks import MaskReel, coarse, fill_cells, grow, without


def blank() -> np.ndarray:
    return np.zeros((40, 60), np.bool_)


@pytest.mark.parametrize("pixels", [1, 3, 9, 50])
def test_growing_is_a_square_around_every_pixel(pixels):
    mask = np.random.default_rng(0).random((40, 60)) > 0.99
    assert (grow(mask, pixels) == maximum_filter(mask, 2 * pixels + 1, mode="constant")).all()


def test_nine_pixels_are_three_times_seven_by_seven():
    mask = np.random.default_rng(1).random((40, 60)) > 0.99
    thrice = mask
    for _ in range(3):
        thrice = maximum_filter(thrice, 7, mode="constant")
    assert (grow(mask, 9) == thrice).all()


def test_one_cell_is_the_box_of_the_mask():
    mask = blank()
    mask[5, 10] = mask[20, 30] = True
    filled = fill_cells(mask, (1, 1))
    assert filled[5:21, 10:31].all()
    assert filled.sum() == 16 * 21


def test_only_touched_cells_are_filled():
    mask = blank()
    mask[0, 0] = mask[19, 29] = True  # the box is 20 x 30, its cells 10 x 10
    filled = fill_cells(mask, (3, 2))
    assert filled[:10, :10].all()
    assert filled[10:20, 20:30].all()
    assert filled.sum() == 200


@pytest.mark.parametrize("cells", [(1, 1), (10, 20), (256, 256)])
def test_a_mask_of_one_pixel_is_its_own_cell(cells):
    mask = blank()
    mask[7, 8] = True
    assert (fill_cells(mask, cells) == mask).all()


def test_an_empty_mask_stays_empty():
    assert not coarse(blank(), dilation=9, cells=(1, 1)).any()


@pytest.mark.parametrize("cells", [(1, 1), (4, 6), None])
def test_the_coarse_mask_covers_the_person(cells):
    mask = np.random.default_rng(2).random((40, 60)) > 0.98
    assert coarse(mask, dilation=2, cells=cells)[mask].all()


def test_without_dilation_and_cells_the_outline_stays():
    mask = np.random.default_rng(3).random((40, 60)) > 0.9
    assert (coarse(mask, dilation=0, cells=None) == mask).all()


def test_the_background_is_black_where_the_mask_is():
    frame = np.full((40, 60, 3), 77, np.uint8)
    mask = blank()
    mask[3:9, 4:11] = True
    left = without(frame, mask)
    assert not left[mask].any()
    assert (left[~mask] == 77).all()
    assert left.dtype == np.uint8


def reel(*present: bool) -> tuple[MaskReel, list[np.ndarray]]:
    made, masks = MaskReel((60, 40)), []
    for index, there in enumerate(present):
        mask = blank()
        if there:
            mask[index, 2 * index : 2 * index + 7] = True
        masks.append(mask)
        made.add(mask)
    return made, masks


def test_masks_come_back_as_they_were():
    made, masks = reel(True, True, True)
    made.check()
    assert all((given == back).all() for given, back in zip(masks, made.filled(), strict=True))


def test_an_empty_mask_is_replaced_by_the_one_before_at_first_by_the_next():
    made, masks = reel(False, True, False, False, True)
    with pytest.warns(WanloomWarning, match=r"W3020: .* 3 of 5 frames \(0, 2, 3\)"):
        made.check()
    order = [1, 1, 1, 1, 4]
    assert all((masks[index] == back).all() for index, back in zip(order, made.filled(), strict=True))


def test_a_clip_without_any_mask_is_refused():
    made, _ = reel(False, False)
    with pytest.raises(InputError) as caught:
        made.check()
    assert caught.value.code == "E3020"
