"""Front ends: models of other libraries, from their directories to running under a cap.

Each is imported by its own name, and needs the library only then. A new one is a module here: it
makes a skeleton and sources of weights in whichever way its library does, and registers them.

May import `manager`, `loading` and the ground. Loading sets switches of the library for its time:
one thread at a time.
"""
