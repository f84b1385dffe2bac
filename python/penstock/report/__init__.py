"""Figures for people: statistics of models and managers, the timeline, progress bars.

It knows none of what it reports on, and may import the ground alone. Its values are frozen; any
thread may make and read them. A progress bar belongs to the thread that shows it.
"""
