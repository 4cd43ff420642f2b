"""The command line: parse, call, print. One file a verb, and nothing here computes.

A verb's file imports only light modules at its top, so that ``swapless --help`` answers without torch, numba or Arrow; the
heavy imports stand inside the functions that need them.
"""
