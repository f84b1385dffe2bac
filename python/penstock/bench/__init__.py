"""The benchmark: Penstock beside plain PyTorch, hand-written streaming, and others' offloading.

`penstock bench` runs it. Each case runs in a process of its own (`case`), is found in a catalogue
(`cases`), and gives one row of the table (`table`); what a run can say about what Penstock promises
is judged in `claims`. A case that cannot run is a row with the reason, never the end of a run.

May import all rooms but `cli`. One thread in each process, beside one that samples memory.
"""
