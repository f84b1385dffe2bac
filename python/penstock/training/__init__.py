"""Training under a cap: weights, gradients and states of the optimizer on one model's memory.

`preparing` is the front door. `survey` finds out which states an optimizer will have; each gradient
and each state then has a place of its own (`place`) behind the weights, so that operations page it
as they page weights, and one plan is for all. `gradients` moves gradients there as they come;
`states` has the optimizer step through runs of parameters, and moves states as they are made and
loaded. May import `manager`, `loading`, `memory`, `dispatch` and the ground. Gradients arrive in
autograd's own threads, one place in one thread; everything else is in the thread that trains.
"""

from penstock.training.preparing import prepare

__all__ = ["prepare"]
