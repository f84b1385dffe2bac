"""The hard cap of the process: torch's allocator on Penstock's frames, and all that watches it.

`hard_cap` is the ledger of one device, `torch_hook` puts it under torch, `capped` caps a block of
one thread, `pressure` and `cap_stats` tell what happens. May import `memory`, `report` and the
ground; it knows no managers, which register a function for their figures. Thread-safe. Events of
pressure are told on a thread of their own.
"""
