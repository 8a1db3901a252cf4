"""The networks of the catalogue in PyTorch, which ours are compared with.

They were written from the papers, independently of `models`.
"""

import functools

from benchmarks.pytorch import classifiers, segmenters, translators, upanet

NETWORKS = (
    classifiers.NETWORKS
    | segmenters.NETWORKS
    | translators.NETWORKS
    | upanet.NETWORKS
    # The authors' code, like ours, has neither norm nor ReLU before the shuffle.
    | {
        f"resnet{depth}_duc_hdc": functools.partial(
            segmenters.DUCHDC, depth, norm_act=False
        )
        for depth in (50, 101)
    }
)
