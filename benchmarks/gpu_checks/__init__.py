"""The parts of ``gpu_check.py``: what is checked and measured on a GPU machine, each part a function of a job."""
