"""Several models under one cap: who gets how much, who stays, who goes.

`policy` (in the ground) orders those that may give way, `sharing` divides, `residency` protects,
`acquire_on_call` has models be in use while they are called. May import `run`, `memory`, `report`
and the ground. Not thread-safe: the manager's lock has one thread divide at a time. Operations of
other threads may take frames meanwhile, which is `Overtaken`.
"""
