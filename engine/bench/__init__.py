"""Throughput of every stage, each beside the physical limit that holds it: ``engine bench``.

``rows`` says what a measurement is, ``timing`` how time is taken, ``limits`` what a machine can do; each part (input,
views, loss, step, kmeans, cohort) is a file of its own, and ``suite`` runs them.
"""
