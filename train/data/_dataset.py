"""What a dataset is to the tasks and the loop."""

import dataclasses

import numpy as np

Split = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """Arrays of examples with what is needed to normalise and interpret them.

    Attributes:
      name: the name it is loaded by.
      train: "image", uint8 (examples, height, width, channels), and "label", int32
        (examples,).
      test: the same for other examples.
      num_classes: number of classes; labels are below it.
      mean: per channel, of the training images scaled to [0, 1].
      std: likewise the standard deviation.
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def hold_out(self, fraction: float = 0.2) -> "Dataset":
        """Replaces the test split by the last part of the training split.

        To choose settings by, so that test images keep out of every choice.
        """
        n = round(len(self.train["label"]) * (1 - fraction))
        return dataclasses.replace(
            self,
            train={k: v[:n] for k, v in self.train.items()},
            test={k: v[n:] for k, v in self.train.items()},
        )
