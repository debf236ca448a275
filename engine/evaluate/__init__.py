"""Protocols on labelled videos."""
