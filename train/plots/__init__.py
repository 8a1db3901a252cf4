"""Figures of runs, datasets and studies, as PNG files.

A figure is saved whole or not at all, and looks the same whatever the settings of
Matplotlib are.
"""

from train.plots._common import class_colors as class_colors
from train.plots.charts import save_bars as save_bars
from train.plots.charts import save_confusion_matrix as save_confusion_matrix
from train.plots.charts import save_curves as save_curves
from train.plots.charts import save_differences as save_differences
from train.plots.charts import save_learning_curves as save_learning_curves
from train.plots.charts import save_profiles as save_profiles
from train.plots.images import MOST_EXAMPLES as MOST_EXAMPLES
from train.plots.images import save_images as save_images
from train.plots.images import save_masks as save_masks
