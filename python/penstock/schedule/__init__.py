"""Orders of operations, and plans for them.

May import `memory` and the ground. A plan belongs to one model; whoever runs that has one thread at
a time plan for it.
"""
