"""Throughput of every stage, each beside the physical limit that holds it: ``engine bench``.

``rows`` says what a measurement is, ``base`` how time is taken and what a machine can do; each part (input, views,
loss, step, kmeans, cohort) is a file of its own, and ``suite`` runs them.
"""
