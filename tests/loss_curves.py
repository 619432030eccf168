"""Leave out the loss curves of runs: drawing one takes longer than most tests train. Importing this does.

A test that looks at them asks for the fixture `loss_curves`.
"""

from lamamba.training.log import TrainingLog

draw = TrainingLog._plot
TrainingLog._plot = lambda log: None  # type: ignore[method-assign]
