"""Settings, run folders, files, processes and workers; knows nothing of video."""
