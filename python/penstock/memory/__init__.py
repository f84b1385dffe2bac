"""What is under one model's tensors: a region of pages, and how bytes get there.

`pager` and `region` are the low level. `model_memory` is the one interface over `frames_memory` and
`managed_memory`; who runs, shares or plans for a model asks it alone. A hard cap is known by
`hard_cap_view`, a protocol. May import `dispatch`, `report` and the ground; it knows no modules of
torch's, no checkpoints, no managers. A memory belongs to whoever runs its model: one thread at a
time arranges it, while any thread may have its pages go.
"""
