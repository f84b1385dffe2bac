"""What users hold: the memory manager, its settings, and the ways to a managed module.

`MemoryManager` is three layers: models in use, taking models in, and the rest. `offload` and
`LazyModule` stand on it. May import all rooms below: `sharing`, `run`, `loading`, `cap`,
`schedule`, `memory`, `report`, and the ground. Thread-safe: one lock for each manager.
"""
