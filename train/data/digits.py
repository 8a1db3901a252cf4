"""Real handwritten digits, 8x8 pixels, that come with scikit-learn.

They are the 1,797 test digits of E. Alpaydin, C. Kaynak, `Optical Recognition of
Handwritten Digits <https://doi.org/10.24432/C50P49>`_, 1998. They are split here once
and for all into 1,000 to train and 797 to test, with the classes in equal shares; so
few to train leave a network something to get wrong.
"""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from train.data._dataset import Dataset


def load() -> Dataset:
    """Loads the digits as images of one channel, 0 to 255."""
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, train_size=1000, stratify=labels, random_state=0
    )
    unit = train_images / 255
    return Dataset(
        name="digits",
        train={"image": train_images, "label": train_labels},
        test={"image": test_images, "label": test_labels},
        num_classes=10,
        mean=(float(unit.mean()),),
        std=(float(unit.std()),),
    )
