"""Front ends: models of other libraries, from their directories to running under a cap.

Each is imported by its own name, and needs the library only then.
"""
