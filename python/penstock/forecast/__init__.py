"""What a model will need and how fast it will run, before any of its weights is read.

`penstock.estimate` is made here; the room has another name than the function, which would hide it.
It asks what really runs: the layout of a region (`loading`), the planner and the sizes of pages
(`memory`), the choice of a host tier. `parts` has what is to be placed, from headers or from a
module; `reads` says which tensors one operation reads; `target` is the device and its settings;
`sizing` finds the least cap; `passes` what stays, streams, and takes time; `rates` and `read_rate`
measure; `estimate` puts it together. But for these two and what the headers cost, it is pure.

May import `loading`, `memory`, `checkpoint`, `report` and the ground. Values are frozen; any
thread may estimate.
"""
