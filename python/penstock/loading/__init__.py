"""From a module and its weights to tensors on pager memory.

In this order: `skeleton` builds the module without memory, `weights` finds the bytes, `slots` pairs
both, `layout` says where each tensor lies, `fill` and `host_tiers` put the bytes there, `binding`
gives them to the module. `moving` does it for a module that is loaded already, and back. `deferred`
has other libraries rearrange weights that are not read yet. May import `memory`, `checkpoint`,
`dispatch`, `report` and the ground. One thread at a time loads a model; building skeletons is
thread-safe.
"""
