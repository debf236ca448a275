"""What ``engine.report`` puts on a page: a run's facts, sentences about them, and sketches of its figures.

Plain Python and NumPy; the heavy libraries that paint and render are imported by ``engine.report`` alone.
"""
