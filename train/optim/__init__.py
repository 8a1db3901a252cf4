"""Optimizers: the base optimizers of optax with any of the techniques in any order."""
