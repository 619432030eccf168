"""Skip the loss curves of runs when this module is imported: drawing one takes longer than the training in most tests.

A test that needs them uses the fixture `loss_curves`.
"""

from lamamba.training.log import TrainingLog

draw = TrainingLog._plot
TrainingLog._plot = lambda log: None  # type: ignore[method-assign]
