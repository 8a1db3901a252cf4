import numpy as np
import pytest

from train import data


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_digits_are_the_real_ones(digits):
    train, test = digits.train, digits.test
    assert train["image"].dtype == np.uint8
    assert train["image"].shape[1:] == (8, 8, 1)
    assert len(train["label"]) + len(test["label"]) == 1797
    for split in (train, test):
        shares = np.bincount(split["label"], minlength=10) / len(split["label"])
        np.testing.assert_allclose(shares, 0.1, atol=0.01)
    assert train["image"].max() == 255
    assert train["image"].min() == 0


def test_splits_share_no_example_and_stay_the_same(digits):
    again = data.load("digits")
    np.testing.assert_array_equal(digits.train["image"], again.train["image"])
    rows = [
        {image.tobytes() for image in split["image"]}
        for split in (digits.train, digits.test)
    ]
    assert not rows[0] & rows[1]


def test_mean_and_std_are_those_of_the_training_images(digits):
    images = digits.train["image"] / 255
    assert digits.mean == pytest.approx([images.mean()])
    assert digits.std == pytest.approx([images.std()])


def test_validation_holds_out_training_images_only(digits):
    held = digits.hold_out()
    assert len(held.train["label"]) == 800
    assert len(held.test["label"]) == 200
    joined = np.concatenate([held.train["image"], held.test["image"]])
    np.testing.assert_array_equal(joined, digits.train["image"])


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="unknown dataset 'digit'; known: digits"):
        data.load("digit")
