"""Which settings are fastest here: each tried in a process of its own, by what the user times.

`tune` runs the trials, of `candidates` where the user names none; `trial` is what runs in each
process, told by a `task`; `tuned` is the result. May import `manager` and what is below it. A call
of `tune` belongs to one thread, which it blocks; results are frozen.
"""
