"""What runs one model: its plan from pass to pass, captured passes, the user's own kernels.

Operations page by themselves in the core; nothing here is on the way of one. May import
`loading` (for binding), `schedule`, `memory`, `report` and the ground. Passes end on whichever
thread called the model, and others take pages meanwhile: a lock guards the plan.
"""
