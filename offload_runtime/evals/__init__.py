"""Evaluation: suites over a grid of settings, against dense attention through the same engine.

May import everything in offload_runtime; of the rest only the command line imports this.
"""
