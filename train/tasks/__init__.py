"""What networks are trained for: one file for each task."""

from train.tasks import classification, segmentation, translation

# The module and the config of each task, by name.
TASKS = {
    classification.NAME: (classification, classification.ClassificationConfig),
    segmentation.NAME: (segmentation, segmentation.SegmentationConfig),
    translation.NAME: (translation, translation.TranslationConfig),
}

__all__ = ["TASKS"]
